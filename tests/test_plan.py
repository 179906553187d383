"""`--plan`: names of topologies, the sums and what is said of them, and that what is planned is what the job runs."""

import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest
from critic_miniature import picture, write_miniature
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_pipeline import tiny_generator

import firm_jax.critic.programs
from firm_jax import plan as planning
from firm_jax import topology
from firm_jax.abstract import outputs
from firm_jax.config import load_config
from firm_jax.critic import Critic, decode
from firm_jax.critic.programs import AbstractCritic
from firm_jax.errors import ConfigError, WeightsError
from firm_jax.generation.sd3 import SD3Generator
from firm_jax.mesh import make_mesh
from firm_jax.plan import GIB, Needs, Program, exhausted, judge, plan, report, shard_bytes
from firm_jax.published import CRITICS, published
from firm_jax.rl import job, rollout, train
from firm_jax.rl.programs import RLPrograms

CONFIG = Path(__file__).parents[1] / "configs" / "gen_qma.py"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v5e:4x4", (4, 4)),
        ("v5e:1x1", (1, 1)),
        ("v5p:2x2x4", (2, 2, 4)),
        ("v6e:16x16", (16, 16)),
        ("h100:1", (1,)),
        ("h200:8", (8,)),
    ],
)
def test_a_topology_is_a_generation_and_a_shape(name, shape):
    found = topology.parse(name)
    assert (found.name, found.shape, found.size) == (name, shape, jnp.prod(jnp.array(shape)))


@pytest.mark.fault("wrong-config")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v4:2x2x1", "not a topology.*v5e, v5p, v6e"),
        ("v5e", "not a topology.*v5e:4x4"),
        ("v5e:4x", "not a topology"),
        ("v5e:2x2x1", "v5e topologies have 2 axes, not 3; for example v5e:4x4"),
        ("v5p:4x4", "v5p topologies have 3 axes, not 2; for example v5p:4x4x4"),
        ("v5e:3x4", "no such slice.*whole hosts of 2x2 chips"),
        ("v5p:2x2x0", "no such slice"),
        ("v6e:32x2", "at most 16 chips along an axis"),
        ("b100:8", "not a topology.*h100:1 or h200:8; known are v5e, v5p, v6e, h100, h200"),
        ("h100", "not a topology"),
        ("h100:3", "no such node. After h100: comes the number of GPUs, one of 1, 2, 4, 8"),
        ("h200:2x4", "no such node"),
    ],
)
def test_other_names_are_refused_with_those_that_there_are(name, said):
    with pytest.raises(ConfigError, match=said):
        topology.parse(name)


@pytest.mark.fault("wrong-config")
def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu\]'"):
        topology.devices(topology.parse("v5e:2x2"))


def test_a_compiler_that_another_process_keeps_to_itself_is_an_error_that_says_so(monkeypatch):
    def locked(*_, **__):
        raise RuntimeError("ABORTED: Internal error when accessing libtpu multi-process lockfile. Run ...")

    monkeypatch.setitem(sys.modules, "libtpu", ModuleType("libtpu"))
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "0")
    monkeypatch.setattr(topology.topologies, "get_topology_desc", locked)
    with pytest.raises(ConfigError, match="another process holds libtpu, and ALLOW_MULTIPLE_LIBTPU_LOAD=0 forbids"):
        topology.devices(topology.parse("v5e:2x2"))


@pytest.mark.fault("wrong-config")
def test_a_model_whose_config_is_not_to_be_had_is_named_with_those_that_are():
    with pytest.raises(WeightsError, match=r"critic.model is 'someone/critic'.*VisionXLab/FIRM-Gen-8B"):
        published(CRITICS, "someone/critic", "critic.model")


def program(name: str, **given) -> Program:
    return Program(name, jax.jit(lambda x: x), (), (), **{"flops": 3 * 10**12, "calls": 2} | given)


def mesh_of(**sizes):
    return make_mesh(**sizes, devices=jax.devices())


def test_what_runs_beside_the_weights_decides_whether_it_fits():
    small = Needs(program("small"), peak=5 * GIB, fed=GIB, arguments=4 * GIB)
    large = Needs(program("large"), peak=9 * GIB, fed=0, arguments=4 * GIB)
    slice_, mesh = topology.parse("v5e:2x4"), mesh_of(data=1, fsdp=8)
    assert judge(slice_, mesh, 10 * GIB, [small, large]) == (
        True,
        "v5e:2x4 fits: 15.00 of 15.75 GiB a chip at most (large), a margin of 0.75 GiB",
    )
    fits, said = judge(slice_, mesh, 11 * GIB, [small, large])
    assert not fits
    assert said.startswith("v5e:2x4 does not fit: 16.00 of 15.75 GiB a chip (large), a margin of -0.25 GiB\n")


@pytest.mark.parametrize(
    ("mesh", "resident", "remedy"),
    [
        ({"data": 4, "fsdp": 2}, 20, "--config.mesh.data=1 --config.mesh.fsdp=8"),
        ({"data": 1, "fsdp": 8}, 3, "lower critic.batch_size"),
        ({"data": 1, "fsdp": 8}, 20, "take more chips"),
    ],
)
def test_what_does_not_fit_comes_with_a_remedy(mesh, resident, remedy):
    need = Needs(program("large", limit="critic.batch_size"), peak=20 * GIB, fed=0)
    fits, said = judge(topology.parse("v5e:2x4"), mesh_of(**mesh), resident * GIB, [need])
    assert not fits and remedy in said


@pytest.mark.parametrize(
    ("message", "beside"),
    [
        ("Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.", 17.5),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (18.50G) exceeds available HBM "
            "(15.75G).",
            19.5,
        ),
    ],
    ids=["in all", "temporaries"],
)
def test_a_program_that_the_compiler_refuses_is_reported_with_its_size(message, beside):
    mesh = mesh_of(data=1, fsdp=8)
    weights = jax.ShapeDtypeStruct((8, GIB // 4), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    refused = Program("greedy", jax.jit(lambda x, length: x), (weights, 77), (), flops=0, calls=1)
    need = exhausted(refused, 0, f"RESOURCE_EXHAUSTED: {message}\nmore lines")
    assert need.beside(shard_bytes(weights)) == int(beside * GIB)
    assert need.refused == message
    slice_ = topology.parse("v5e:2x4")
    fits, said = judge(slice_, mesh, GIB, [need])
    assert not fits and "does not fit" in said
    assert f"greedy: {message}" in report(slice_, mesh, {"weights": GIB}, [need])


def test_even_a_small_program_that_is_refused_does_not_fit():
    need = Needs(program("odd"), peak=GIB, fed=0, refused="no room in vmem")
    assert not judge(topology.parse("v5e:2x4"), mesh_of(data=1, fsdp=8), GIB, [need])[0]


def test_the_table_has_a_line_a_program_and_the_sums_of_an_epoch():
    needs = [
        Needs(program("first"), 3 * GIB, GIB // 2, 2 * GIB, GIB, 0, {"all-gather": 1.5 * GIB, "all-reduce": GIB}, 2.0),
        Needs(program("second", calls=0), GIB, 0, GIB, seconds=5.0),
    ]
    lines = report(topology.parse("v5e:2x4"), mesh_of(data=2, fsdp=4), {"weights": 4 * GIB}, needs)
    cells = {line.split()[0]: line.split() for line in lines if line}
    assert lines[0] == "v5e:2x4: 8 chips with 15.75 GiB that programs may use, mesh data=2 fsdp=4 tensor=1"
    assert lines[2] == "kept on each chip for the whole run, GiB" and "GiB a chip" in lines[6]
    assert cells["weights"] == ["weights", "4.00"]
    assert cells["first"] == ["first", "2.00", "1.00", "0.00", "3.00", "5.50", "3.00", "2.50", "2", "2"]
    assert cells["most,"][-5:] == ["3.00", "5.50", "6", "5.00", "7"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny job on random networks, small enough to be run and to be compiled a second time."""
    folder = tmp_path_factory.mktemp("world")
    tiny_generator(num_layers=2).save_pretrained(folder / "model")
    write_miniature(folder / "critic")
    prompts = ["a red circle", "two blue squares", "a perfect star", "a green cross above a red square"]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    config = load_config(f"{CONFIG}:tiny")
    size = {"height": 32, "width": 32, "max_text_tokens": 3, "steps": 2, "batch_size": 6}
    config.rollout.update(size)
    config.eval.update(size | {"every": 1, "prompts": 2, "images_per_prompt": 2, "judged": 0, "oracle": False})
    config.mesh.update({"data": 2, "fsdp": 2, "tensor": 1})
    config.update_from_flattened_dict(
        {
            "model": str(folder / "model"),
            "critic.model": str(folder / "critic"),
            "critic.batch_size": 16,
            "critic.max_new_tokens": 20,
            "critic.max_failure_rate": 1.0,
            "prompts.train": str(folder / "prompts.txt"),
            "prompts.held_out": str(folder / "prompts.txt"),
            "group.prompts_per_epoch": 2,
            "group.images_per_prompt": 3,
            "lora.rank": 2,
            "train.epochs": 1,
            "train.updates_per_epoch": 2,
            "train.micro_batch": 2,
            "train.timesteps": 2,
        }
    )
    return config


@pytest.fixture
def four_devices(monkeypatch):
    monkeypatch.setattr(train, "make_mesh", partial(make_mesh, devices=jax.devices()[:4]))
    monkeypatch.setattr(planning, "devices", lambda topology: jax.devices()[:4])


def leaves(tree) -> list[tuple]:
    """Path, shape and dtype of every array, and how it lies on a mesh where it lies on one."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if hasattr(leaf, "shape"):
            mesh = isinstance(leaf.sharding, NamedSharding)
            found.append((jax.tree_util.keystr(path), leaf.shape, leaf.dtype, leaf.sharding if mesh else None))
    return found


def same(planned: tuple, given: tuple) -> bool:
    lies = given[3] is None or planned[3].is_equivalent_to(given[3], len(given[1]))
    return planned[:3] == given[:3] and lies


def test_what_is_planned_is_what_the_job_runs(world, four_devices, monkeypatch, tmp_path):
    given: dict[str, tuple] = {}

    def recorded(name, function):
        def call(*arguments, **keywords):
            given[name] = (arguments, keywords)
            return function(*arguments, **keywords)

        return call

    def recording(module, name, label):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: recorded(label(*a), make(*a, **k)))

    for name, label in (("encode_images", "vision"), ("embed", "splice"), ("prefill", "prefill")):
        monkeypatch.setattr(decode, name, recorded(f"critic: {label}", getattr(decode, name)))
    monkeypatch.setattr(decode, "decode_chunk", recorded("critic: decode", decode.decode_chunk))
    recording(job, "make_update", lambda *_: "NFT update")
    world.eval.batch_size = 4  # not the rollout's, so that the two are told apart
    recording(rollout, "make_draw", lambda _, settings: "eval" if settings.batch_size == 4 else "rollout")
    on_host = SD3Generator.decode_on_host

    def decode_on_host(self, latents):
        name = "eval: VAE decode" if len(latents) == 4 else "VAE decode"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self, "decode_jitted", recorded(name, self.decode_jitted))
            return on_host(self, latents)

    monkeypatch.setattr(SD3Generator, "decode_on_host", decode_on_host)
    encode = SD3Generator.encode_prompts

    def encode_prompts(self, prompts, *rest):
        text = self.text_encoders
        if len(prompts) == world.group.prompts_per_epoch:
            monkeypatch.setattr(text, "encode_jitted", recorded("encode prompts", text.encode_jitted))
        return encode(self, prompts, *rest)

    monkeypatch.setattr(SD3Generator, "encode_prompts", encode_prompts)
    monkeypatch.setattr(firm_jax.critic.programs, "PROMPT_TOKENS", 40)  # what these prompts have, roughly
    train.train(world, str(tmp_path))

    programs = {p.name: p for p in RLPrograms(world, make_mesh(**world.mesh, devices=jax.devices()[:4])).programs()}
    assert set(given) == set(programs) - {"critic: drop ended"}
    for name, call in given.items():
        assert_planned(programs[name], *call)


def assert_planned(program: Program, arguments: tuple, keywords: dict):
    planned, real = leaves(program.arguments), leaves(arguments)
    assert len(planned) == len(real), program.name
    assert [pair for pair in zip(planned, real, strict=True) if not same(*pair)] == [], program.name
    assert dict(program.keywords) == keywords, program.name


def test_what_is_planned_for_edits_is_what_the_critic_runs(world, monkeypatch, tmp_path):
    """Two sources with six edits each, judged by two criteria in two batches; the programs are traced, not run."""
    mesh = make_mesh(**world.mesh, devices=jax.devices()[:4])
    run: list[tuple] = []

    def traced(function):
        def call(*arguments, **keywords):
            run.append((function, arguments, keywords))
            fixed = arguments[: function is not decode.copy_prefixes]  # the graph, where there is one
            return outputs(mesh, lambda *given: function(*fixed, *given, **keywords), *arguments[len(fixed) :])

        return call

    criteria = ["edit_execution", "edit_consistency"]
    for name, words in zip(criteria, ("Has it been done?", "Is the rest as it was?"), strict=True):
        (tmp_path / f"{name}.txt").write_text(f"{words} {{prompt}}")
    settings = world.critic.copy_and_resolve_references()
    settings.rubrics = str(tmp_path)
    critic = Critic.from_pretrained(settings.model, dtype="float32", mesh=mesh, rubrics=tmp_path, max_batch=16)
    shown = [[picture(source, 60, 70), picture(10 * (source + 1) + n, 64, 64)] for source in range(2) for n in range(6)]
    texts = [critic.rubrics[name].fill("a red circle", "") for name in criteria]
    prompts = [critic.processor.sequence(images, text) for text in texts for images in shown]
    for name in ("encode_images", "embed", "read_prefixes", "copy_prefixes", "prefill"):
        monkeypatch.setattr(decode, name, traced(getattr(decode, name)))
    monkeypatch.setattr(critic.decoder, "_decode", lambda state, stage, *_: [None] * sum(map(len, stage.pieces)))
    critic.decoder.generate(prompts, 20)
    monkeypatch.undo()

    monkeypatch.setattr(firm_jax.critic.programs, "PROMPT_TOKENS", 4)
    planned = AbstractCritic(settings, "float32", mesh)
    programs = [*planned.programs(12, (64, 64), criteria, sources=[(70, 60)], candidates=6)]
    assert [program.name.removeprefix("critic: ") for program in programs] == [
        *("source vision", "source splice", "source prefill", "source kept"),
        *("picture vision", "picture splice", "picture copies", "picture prefill"),
        *("splice", "copies", "prefill", "decode", "drop ended"),
    ]
    assert len(run) > len(programs)  # of two batches
    for program, (function, arguments, keywords) in zip(programs[:-2], run, strict=False):
        assert program.function is function
        assert_planned(program, arguments, keywords)


def test_a_plan_compiles_every_program_and_says_whether_they_fit(world, four_devices, monkeypatch, capsys):
    fits = plan(world, "v5e:2x2", RLPrograms)
    said = capsys.readouterr().out
    names = ["encode prompts", "rollout", "VAE decode", "critic: vision", "critic: splice", "critic: prefill"]
    names += ["critic: decode", "critic: drop ended", "NFT update", "eval", "eval: VAE decode"]
    assert fits
    assert [line.split(" in ")[0] for line in said.splitlines() if line.startswith("compiled")] == [
        f"compiled {name}" for name in names
    ]
    assert said.splitlines()[-1].startswith("v5e:2x2 fits: 0.")
    monkeypatch.setitem(topology.GENERATIONS, "v5e", topology.Generation(axes=2, largest=16, hbm=100_000))
    monkeypatch.setattr(RLPrograms, "programs", lambda self: self.encoding["rollout"].programs)
    assert not plan(world, "v5e:2x2", RLPrograms)
    assert "does not fit" in capsys.readouterr().out
