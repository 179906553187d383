"""Writes docs/reliability.md: what can go wrong, what is promised then, and the tests that keep the promise.

A test says which promise it keeps with `@pytest.mark.fault("its-key")`; the page is made from these marks, by
`python tests/reliability.py`, and tests/test_reliability.py fails when page, promises and marks part ways.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"


@dataclass(frozen=True)
class Fault:
    """A row: what goes wrong, and what happens then."""

    what: str
    promise: str


# In the order of the page. A key is what `pytest.mark.fault` is given.
SECTIONS: dict[str, dict[str, Fault]] = {
    "Stopped, killed, moved": {
        "killed": Fault(
            "`kill -9` at any moment, also while a checkpoint is written or an old one deleted",
            "The same command continues from the newest complete checkpoint. Metrics, judgements and LoRA end "
            "bit-equal to an uninterrupted run's.",
        ),
        "preempted": Fault(
            "SIGTERM or Ctrl-C",
            "The RL job stops within the epoch, between two batches of pictures, answers or updates, and saves how it "
            "was at the epoch's start; before the first epoch it stops at once. The exit code is 75, and the same "
            "command continues to the same bits. A second signal ends it at once (143 or 130), whatever it waits for.",
        ),
        "power-loss": Fault(
            "The power fails right after a checkpoint",
            "Its files, their folders and the lines of metrics that it covers are forced to the disk before the "
            "rename that makes it a checkpoint, and that one before an older checkpoint is deleted.",
        ),
        "other-mesh": Fault(
            "The run continues on other devices, or on more or fewer of them",
            "The same prompts, images and rewards, to rounding. A changed system is told in the log.",
        ),
        "lost-process": Fault(
            "One of several processes dies or hangs",
            "The others end with a message and exit code 76: as soon as an operation of all of them fails, at the "
            "latest when they have seen no sign of life for 60 s. When process 0 dies, JAX may end them itself, at "
            "once and with 134. The same command on every host continues, on another mesh too.",
        ),
        "scoring-killed": Fault(
            "`firm-jax score`, `firm-jax bench` or the job `bench` is stopped or killed at any moment",
            "The same command judges nothing again of which whole batches are on the disk, and ends in the same file.",
        ),
        "scoring-changed": Fault(
            "`firm-jax score` is continued with another list, critic, rubric or setting, or a judged picture has "
            "changed",
            "Refused, and what differs is named; the judgements stay as they are.",
        ),
    },
    "Storage": {
        "damaged-checkpoint": Fault(
            "A bit flips in a checkpoint, a file of it is cut short, missing or added",
            "Every file's size and hash are in its manifest. The checkpoint is set aside, loudly, and the one before "
            "it is used, and `checkpoint/damaged` counts it; with none left the run refuses to start over by itself.",
        ),
        "disk-full": Fault(
            "The disk is full",
            "The checkpoints before stay whole, no half one is left, and the run ends with exit code 2 and an error "
            "that says where; with room again the same command continues to the same bits. Only TensorBoard's copy of "
            "the metrics may end early.",
        ),
        "hanging-storage": Fault(
            "The storage hangs, during a save or a line of metrics",
            "After a limit (20 minutes) the process ends with an error, also when threads of its libraries never do; "
            "the checkpoints before stay whole.",
        ),
        "other-model": Fault(
            "The checkpoint is of another model, other base weights or a config that contradicts this one",
            "The run is refused, and every difference is named.",
        ),
        "two-runs": Fault(
            "A second run is started in a folder that is in use",
            "It is refused with the holder's process, host and start. The lock of a dead one is taken over, with a "
            "notice.",
        ),
        "damaged-weights": Fault(
            "Weights are missing, truncated, unreadable, of another dtype or shape, or named by an index but not there",
            "An error that names file and tensor before anything is trained, NaN and infinity in them included. A "
            "flipped bit that leaves a number finite is not seen.",
        ),
        "memory-of-loading": Fault(
            "The weights are larger than the host's memory",
            "Tensors go from the file to their shards one by one: beside the shards, never more than 1.5 times the "
            "largest tensor and 500 MB in the host's memory.",
        ),
        "memory-of-devices": Fault(
            "The weights are larger than one device's memory",
            "With `mesh.fsdp` above 1 no program of the RL job holds a stack of layers whole, nor two layers of one. A "
            "layer's kernel is gathered for its matmul over many rows; so are, whole, those outside the stacks (the "
            "generator's last block, embedders and output, the critic's patch embedding and merger; 84 MB each for "
            "SD3.5-medium and an 8B critic in bfloat16), but not embedding tables, output heads and modulations. While "
            "the critic writes, no weight is gathered. With `quantize=int8` none has a stack's kernels as floats.",
        ),
    },
    "Numbers": {
        "not-finite": Fault(
            "NaN or Inf in an image, a loss or a gradient, on all devices or on one",
            "The update is not made on any device; its prompts are kept in `skipped_updates.jsonl` and counted in "
            "`update/skipped`; above `train.max_skipped_updates` the run stops, saved. An image that is not finite is "
            "a missing judgement (`critic/status/image_not_finite`); above `critic.max_failure_rate` the run stops.",
        ),
        "missing-reward": Fault(
            "A reward is missing or not a number, or those of a whole group are",
            "It is masked out of statistics, advantages and loss, and counted in `reward/missing`, whole groups in "
            "`reward/missing_groups`; an epoch without any reward changes neither policy.",
        ),
        "equal-rewards": Fault(
            "All rewards of a group are equal, or all of an epoch",
            "Their advantages are exactly 0; the share is `reward/zero_std_ratio`.",
        ),
        "unusable-answers": Fault(
            "The critic's answer is garbage: empty, cut short, HTML, out of range, several scores, an injected one",
            "No number is made up: the judgement has a status instead of a score, and `critic/failure_rate` and "
            "`critic/status/<status>` count it.",
        ),
        "silent-critic": Fault(
            "More judgements fail than `critic.max_failure_rate`",
            "The run stops, saved as it was before the epoch, and says what the answers were.",
        ),
    },
    "Input": {
        "malformed-line": Fault(
            "Malformed records: bad JSON, byte order mark, NUL, wrong types, missing keys, an instruction for editing "
            "without an image or the other way round, a line of 100 MB",
            "Set aside in `quarantine.jsonl` with line and reason, in bounded memory; more than "
            "`prompts.max_bad_fraction` of them refuse the file, and so does a JSON list that breaks off or holds a "
            "piece that is too long.",
        ),
        "broken-benchmark": Fault(
            "Of a benchmark lines, pictures, people's scores or items are missing or cannot be used",
            "More than `max_bad_fraction` of either file refuse it, with the reasons and how often each. Below that "
            "they are left out for every critic alike, and the report counts them.",
        ),
        "hostile-image": Fault(
            "An image that is a decompression bomb, truncated, no image, animated, of absurd size or aspect, or "
            "changed during the run",
            "Refused with one of a fixed set of reasons, before its pixels are decoded where the header tells. The "
            "images of conversations and the source images of edits are all decoded once before anything is trained, "
            "and set aside with their records; a source image that changes later stops the run, "
            "saved as it was before the epoch.",
        ),
        "too-long-example": Fault(
            "A conversation of more tokens than a critic is trained on",
            "Set aside with its number of tokens when the file is read, and never cut.",
        ),
        "half-broken-dataset": Fault(
            "Half of the conversations that a critic is to be trained on cannot be used",
            "Refused before anything is trained, with their number and an example of each reason; all of them are in "
            "the run's `quarantine.jsonl`. A share that is allowed, `data.max_bad_fraction`, is left out.",
        ),
        "other-critic-folder": Fault(
            "A critic's training starts from a folder of another architecture, or whose weights are missing or of "
            "other sizes",
            "Refused before the data is read; the folder and what it holds are named.",
        ),
        "escaping-path": Fault(
            "A path in a record leaves its folder: dot-dot, absolute, symbolic link, NUL, URL",
            "Refused; nothing outside the folder is opened.",
        ),
        "hostile-text": Fault(
            "A prompt with special tokens, braces, chat markup, or ten megabytes of text",
            "Special tokens are plain text to the tokenizers and braces stay braces. A prompt above 8,192 bytes, or "
            "longer than the critic can read, is set aside when the prompts are read, never met in the middle of a "
            "run; a text above a megabyte is refused before it is tokenized.",
        ),
        "hostile-answer": Fault(
            "A prompt, or what the critic writes, is HTML or a script",
            "In the report it is text. The page's policy runs no script but its own, and loads nothing from anywhere.",
        ),
        "wrong-config": Fault(
            "A config key that does not exist, or a value that cannot work: another type, NaN, infinite, out of range",
            "An error that names the key and the nearest ones, before anything is loaded.",
        ),
    },
    "Serving a critic": {
        "batch-company": Fault(
            "Other questions are answered in the same batch, more or fewer of them, in another order",
            "No bit of an answer changes: a question alone decides the shapes of the programs that it meets.",
        ),
        "service-image": Fault(
            "One of a request's images is a decompression bomb, truncated, no image, animated or of absurd size",
            "Its item is `invalid_input` with one of a fixed set of reasons; all others get the answers that they get "
            "without it.",
        ),
        "service-caps": Fault(
            "A request is too large: body, images, pixels, tokens, items; or it is no valid request at all",
            "400, 413, 415 or 422, or `invalid_input` for the one item, before anything is asked of the device. No "
            "reply repeats what was sent.",
        ),
        "service-overload": Fault(
            "More is asked than can be answered",
            "429 with `Retry-After`; the line and the memory of the images in it are bounded, and what was accepted is "
            "answered.",
        ),
        "service-deadline": Fault(
            "A deadline passes, or a client goes away",
            "What waits is not asked any more. Items that were answered in time are told, and remembered for the next "
            "try; 504 when there are none.",
        ),
        "service-device": Fault(
            "The device refuses a batch",
            "Its questions are asked one by one; one that fails alone is `internal`, the others are answered.",
        ),
        "service-canary": Fault(
            "The critic cannot be loaded, writes no readable answer, or answers otherwise than at the start",
            "The service never opens, with exit code 2 and the reason; later `/readyz` is 503 and says why.",
        ),
        "service-token": Fault(
            "Somebody else finds the service",
            "It listens on loopback; elsewhere only with a token, without which every path but `/healthz` and "
            "`/readyz` is 401 before the body is read.",
        ),
        "service-network": Fault(
            "Connections that send garbage, nothing, half of a request or one without end; requests made from the "
            "schema to break it",
            "Refused with 400, 408 or 429; others are answered meanwhile, and no request is answered with 500.",
        ),
        "service-drain": Fault(
            "SIGTERM or Ctrl-C while requests are being answered",
            "They are answered, new ones are 503, and the exit code is 0. A second signal ends the process at once.",
        ),
        "service-memory": Fault(
            "It serves for long",
            "Memory does not grow: 30 MB is what the test allows, over 60 requests.",
        ),
    },
    "A critic on a server": {
        "remote-down": Fault(
            "The server cannot be reached, breaks connections, dies in an epoch",
            "Another endpoint answers for it. One that fails three times in a row is left alone for longer and longer, "
            "and then tried by one request. A restart within `critic.timeout` costs nothing; after that the judgements "
            "are `unreachable`, and above `critic.max_failure_rate` the run stops, saved as it was before the epoch, "
            "with endpoint, cause and remedy. The same command continues to the same bits. When no server is there at "
            "the start, nothing is loaded and no folder is left.",
        ),
        "remote-hangs": Fault(
            "The server is slow or hangs",
            "Every try and every request has a deadline; the judgement is `timeout` and is not asked again, so that a "
            "slow server gets no more to do. When none has answered for `critic.timeout`, what waits is given up.",
        ),
        "remote-overload": Fault(
            "The server says 429, 502, 503 or 504, or has no room for an item",
            "It is asked again after a random pause that grows, not before its `Retry-After`, at most "
            "`critic.attempts` times; items alone, where only they had no room. No other status is asked again.",
        ),
        "remote-garbage": Fault(
            "The reply is no answer: HTML, empty, cut short, huge, packed, other JSON; items missing, doubled, in "
            "another order, or to another request; a score that is out of range, NaN or a text",
            "Order does not matter, for answers go by the question's id. Anything else is a missing judgement "
            "(`malformed_reply`, `rejected`, `server_error`), masked and counted; never a number.",
        ),
        "remote-bench": Fault(
            "A server fails in the middle of a benchmark",
            "What it did not answer has no score and is counted in the failure rate, with the reasons. The same "
            "command asks these questions again, and no other.",
        ),
        "remote-identity": Fault(
            "The server is restarted with other weights, rubrics or settings, or endpoints are not the same critic",
            "The first reply that shows it stops the run, saved; what differs is named. A run is not continued with "
            "another critic than it began with.",
        ),
    },
    "Critic data from teachers": {
        "teacher-killed": Fault(
            "`kill -9` at any moment between two answers, or a disk that takes no more",
            "What was answered is kept, with its cost, in one transaction forced to the disk, and never asked again. "
            "The answers end equal to an uninterrupted run's. A try on its way may have been billed: it counts as "
            "lost, at the most that it may have cost. A power failure takes no answer either, but can take with it "
            "that tries had begun since the last one.",
        ),
        "teacher-budget": Fault(
            "The money or the tokens of the budget run out",
            "No call is begun that could exceed it, those on their way included; the error tells what is spent, and "
            "the same command with a greater budget continues.",
        ),
        "teacher-answers": Fault(
            "A teacher answers HTML, half of a JSON, a refusal, nothing, 429, 5xx, or not in time",
            "Each has an outcome of its own and is counted, with what it cost or may have. 429, 502, 503 and 504 are "
            "asked again as a remote critic is; what the teacher has answered, if only with a refusal, is final; any "
            "other failure is asked again by the next run.",
        ),
        "teacher-unreadable": Fault(
            "An answer that is not in the form asked for, or that declines in words; a record whose images are gone, "
            "damaged or outside the data's folder",
            "The teacher is asked once to write its answer again, without new judgement; what still cannot be read is "
            "set aside, counted by stage and reason. No score is made up, and no later stage is asked.",
        ),
        "teacher-workers": Fault(
            "Curation on Ray: a worker dies, the driver is killed, a machine is cut off, workers ask the same at once",
            "One ledger for all workers: a question is asked by one of them, and the table is the embedded engine's. "
            "What a dead worker had on its way counts as lost and is asked again; nothing done is. A worker that was "
            "replaced can neither ask nor settle any more.",
        ),
        "curation-stopped": Fault(
            "SIGTERM or Ctrl-C in a curation",
            "No further call is begun, those on their way are answered and kept, and the exit code is 75. The same "
            "command goes on, asks nothing again that was answered, and ends in the same bytes. A second signal ends "
            "it at once.",
        ),
        "teacher-two-processes": Fault(
            "Two processes use one ledger, or the file is no ledger",
            "The second one is refused before it asks anything; a file that is something else is left alone.",
        ),
    },
}


def marks() -> dict[str, list[tuple[str, str]]]:
    """Fault -> (test file, test function) of every test marked with it, in the order of the files."""
    found: dict[str, list[tuple[str, str]]] = {}
    for file in sorted(TESTS.glob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            for decorator in getattr(node, "decorator_list", ()):
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
                    for key in decorator.args:
                        found.setdefault(ast.literal_eval(key), []).append((file.name, node.name))
    return found


def page() -> str:
    """docs/reliability.md as it should be."""
    found = marks()
    lines = [
        "# What can go wrong, and what happens then",
        "",
        "Every promise is kept by the tests beside it. This page is made from the tests, by `python",
        "tests/reliability.py`; a test that is gone, or a promise without one, fails the suite.",
    ]
    for section, faults in SECTIONS.items():
        lines += ["", f"## {section}", "", "| what goes wrong | what is promised | kept by |", "|---|---|---|"]
        for key, fault in faults.items():
            tests = "<br>".join(f"[{_sentence(name)}](../tests/{file})" for file, name in found.get(key, ()))
            lines.append(f"| {fault.what} | {fault.promise} | {tests} |")
    return "\n".join(lines) + "\n"


def _sentence(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ")


if __name__ == "__main__":
    PAGE.write_text(page())
