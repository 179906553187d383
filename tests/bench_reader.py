"""A critic for tests of the benchmark, which has read what people said."""

from scripted import judgement

from firm_jax.critic.bench.questions import INJECTION


class Reader:
    """A critic that knows the benchmark: people's score, moved by `change(request, score)`."""

    def __init__(self, bench, change=lambda request, score: score):
        self.bench, self.change, self.calls = bench, change, []
        self.known = {}
        for item in bench.items:
            last = item.pictures[-1].open()[0].tobytes()
            self.known[item.prompt, item.criterion, last] = item.human

    def judge(self, requests, max_new_tokens, progress):
        self.calls.append(len(requests))
        return [self._judge(request) for request in requests]

    def _judge(self, request):
        criterion = {"alignment": "instruction"}.get(request["criterion"], request["criterion"].removeprefix("edit_"))
        prompt = request["prompt"].removesuffix(INJECTION)
        known = self.known.get((prompt, criterion, request["images"][-1].tobytes()), 1)
        score = self.change(request, known)
        return judgement(request["criterion"], score, score and float(score), status="ok" if score else "no_score")
