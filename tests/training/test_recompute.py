"""recompute=blocks: the same step, bit for bit, whose blocks keep their inputs alone."""

import copy
import json

import pytest
import torch
from commands import TINY_CLASSIFY, TINY_PRETRAIN, fails, metrics, run, script
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrun import torchrun

from ssl_bench import classify, pretrain
from ssl_bench.methods import BarlowTwins, Classifier, Method
from ssl_bench.models.backbone import create_backbone
from ssl_bench.runtime.distributed import rank, synchronize_batch_norm, world_size
from ssl_bench.training.gradient import compute_gradient
from ssl_bench.training.memory.recompute import blocks, recompute_blocks, recomputed
from ssl_bench.training.sample_random import SampleRandom

NETWORKS = {
    "resnet18": ("resnet18", {"stem": "cifar"}),
    "convnext": ("convnext_atto", {"stem": "imagenet", "patch_size": 1}),
    "vit": ("vit_tiny_patch16_224", {"stem": "imagenet", "img_size": 8, "patch_size": 2}),
}


def network(name: str, *, drop: float = 0.0) -> tuple[nn.Module, int]:
    """One of `NETWORKS`; with ``drop`` every transformer block drops that share of its branches and activations."""
    timm_name, options = NETWORKS[name]
    backbone, features = create_backbone(timm_name, init="timm", seed=0, **options)
    if name == "vit":
        backbone.blocks = backbone.blocks[:2]
    for module in backbone.modules():
        if drop and isinstance(module, nn.Dropout):
            module.p = drop
    return backbone, features


def twins(name: str, *, drop: float = 0.0) -> BarlowTwins:
    backbone, features = network(name, drop=drop)
    torch.manual_seed(0)
    return BarlowTwins(backbone, features, projector=(32, 24)).train()


def step(method: Method, *, recompute: bool, dtype: torch.dtype = torch.float64, autocast: bool = False) -> dict:
    """Scalars, gradients and running statistics of one step on this process's share of 8 pairs, or labelled images."""
    method = method.to(dtype)
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(8, 3, 8, 8, dtype=dtype, generator=generator) for _ in method.views]
    if isinstance(method, Classifier):
        views[1] = torch.arange(8) % 5
    rows = torch.arange(8).chunk(world_size())[rank()]
    synchronize_batch_norm(method)
    if recompute:
        recompute_blocks(method)
        assert recomputed(method)
    model = DistributedDataParallel(method) if world_size() > 1 else method
    random = SampleRandom(torch.device("cpu"))
    random.begin_step(5)

    class Cast(nn.Module):
        """As Accelerate prepares it: autocast surrounds the forward pass alone."""

        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, *inputs):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return self.module(*inputs)

    terms = compute_gradient(
        Cast(), lambda _: tuple(view[rows] for view in views), 1, Tensor.backward, lambda _: random.rows(rows)
    )
    gradients = {f"gradient of {name}": p.grad for name, p in method.named_parameters()}
    return {k: v.clone() for k, v in ({"loss": terms["loss"]} | gradients | dict(method.named_buffers())).items()}


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


@pytest.mark.parametrize(
    ("name", "drop", "autocast"),
    [("resnet18", 0, False), ("resnet18", 0, True), ("convnext", 0, True), ("vit", 0.1, False), ("vit", 0.1, True)],
)
def test_a_step_is_the_plain_one_bit_for_bit(name, drop, autocast):
    dtype = torch.float32 if autocast else torch.float64
    plain = step(twins(name, drop=drop), recompute=False, dtype=dtype, autocast=autocast)
    again = step(twins(name, drop=drop), recompute=True, dtype=dtype, autocast=autocast)
    assert_equal(plain, again)
    if name == "resnet18":
        assert plain["backbone.layer1.0.bn1.num_batches_tracked"] == 2  # one a view
        assert plain["backbone.layer1.0.bn1.running_mean"].any()
    if drop:  # the control: the numbers count
        assert not torch.equal(
            plain["loss"], step(twins(name), recompute=False, dtype=dtype, autocast=autocast)["loss"]
        )


def test_a_classifier_s_too():
    def classifier() -> Classifier:
        torch.manual_seed(0)
        return Classifier(*network("resnet18"), 5).train()

    assert_equal(step(classifier(), recompute=False), step(classifier(), recompute=True))


def test_random_numbers_that_no_sample_owns_are_repeated_too():
    """torch's own generator, as an attention kernel's dropout uses it."""

    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.randint(0, 9, x.shape[:1])[:, None]

    class Own(BarlowTwins):
        def embed(self, x):
            return self.projector(self.backbone(x))

    def made() -> Method:
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Flatten(1), Noisy(nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Tanh())
        return Own(backbone, 8, projector=(8, 8)).train()

    torch.manual_seed(3)
    plain = step(made(), recompute=False)
    torch.manual_seed(3)
    assert_equal(plain, step(made(), recompute=True))


def of_two_processes() -> dict[str, dict[str, Tensor]]:
    """The step, plain and recomputed, and how many collectives each has."""
    import torch.distributed as dist

    counts, original = [], dist.all_reduce
    found = {}
    for recompute in (False, True):
        called = []
        dist.all_reduce = lambda *words, called=called, **more: (called.append(1), original(*words, **more))[1]
        found[str(recompute)] = step(twins("resnet18"), recompute=recompute)
        dist.all_reduce = original
        counts.append(len(called))
    return found | {"collectives": {"counts": torch.tensor(counts)}}


def test_two_processes_are_one_and_no_collective_is_repeated(tmp_path):
    alone = step(twins("resnet18"), recompute=False)
    for result in torchrun(of_two_processes, 2, tmp_path):
        assert_equal(result["False"], result["True"])
        plain, again = result["collectives"]["counts"].tolist()
        assert plain == again > 40  # of 20 batch norms: one in a forward and one in a backward pass
        for name, value in alone.items():
            torch.testing.assert_close(result["True"][name], value, rtol=1e-10, atol=1e-10, msg=name)


class Alive(TorchDispatchMode):
    """The bytes of all tensors that were made under it and are still held by somebody."""

    def __init__(self, method):
        super().__init__()
        self.made, self.before = {}, {p.untyped_storage()._cdata for p in method.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for x in tree_leaves(outputs):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata in self.before:  # a view of a weight
                    continue
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return outputs

    def bytes(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


def test_a_forward_pass_holds_less_than_half():
    held = {}
    for recompute in (False, True):
        method = twins("resnet18")
        if recompute:
            recompute_blocks(method)
        x = torch.randn(4, 3, 16, 16)
        with Alive(method) as alive:
            outputs = method(x, x)
        held[recompute] = alive.bytes()
        del outputs
    assert held[True] < 0.3 * held[False]  # of each block its input, instead of four maps or six


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet50", {"stem": "cifar"}, ["layer1.0", "layer4.2", 16]),
        ("resnet10t", {}, ["layer1.0", "layer4.0", 4]),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4}, ["blocks.0", "blocks.11", 12]),
        ("convnext_atto", {}, ["stages.0.blocks.0", "stages.3.blocks.1", 12]),
        ("swin_tiny_patch4_window7_224", {}, ["layers.0.blocks.0", "layers.3.blocks.1", 12]),
        ("regnetx_002", {}, ["s1", "s4.b7", 13]),
        ("efficientnet_b0", {}, ["blocks.0.0", "blocks.6.0", 16]),
        ("vgg11_bn", {}, ["", "", 1]),  # no blocks: the network is one
    ],
)
def test_blocks_are_what_their_authors_call_so(name, options, expected):
    with torch.device("meta"):
        backbone, features = create_backbone(name, **{"stem": "imagenet", "init": "timm"} | options)
        found = list(blocks(BarlowTwins(backbone, features, projector=(8, 8))))
    first, last, number = expected
    assert found[-1] == "projector"
    assert (found[0], found[-2], len(found) - 1) == (
        f"backbone.{first}".rstrip("."),
        f"backbone.{last}".rstrip("."),
        number,
    )


def test_a_copy_computes_with_its_own_weights():
    method = twins("resnet18").eval()
    recompute_blocks(method)
    other, x = copy.deepcopy(method), torch.randn(2, 3, 16, 16)
    before = method(x, x)["z1"]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(method(x, x)["z1"], before)
    assert not other(x, x)["z1"].any()


class Stateful(nn.Sequential):
    """Two layers with a state that the forward pass changes, which batch norm alone may."""

    def __init__(self, how: str):
        super().__init__(nn.Linear(12, 12), nn.Linear(12, 12))
        self.how = how
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        """Not pure."""
        if self.how == "buffer":
            self.seen += 1
        return super().forward(x.mul_(2) if self.how == "input" else x)


@pytest.mark.parametrize(
    ("how", "why"), [("buffer", "changes its buffer seen in place"), ("input", "changes its input in place")]
)
def test_a_block_that_is_not_a_function_of_its_input_is_refused(how, why):
    backbone = nn.Sequential(nn.Flatten(1), nn.Linear(12, 12), Stateful(how))
    method = BarlowTwins(backbone, 12, projector=(8, 8))
    recompute_blocks(method)
    x = torch.randn(4, 3, 2, 2)
    with pytest.raises(ValueError, match=f"^recompute must be none for this network, got blocks: a Stateful {why}$"):
        method(x, x)


def test_an_input_that_is_changed_later_is_refused():
    class Careless(BarlowTwins):
        def embed(self, x):
            hidden = self.backbone[1](x.flatten(1))
            return self.projector(self.backbone[2](hidden)) + hidden.add_(1)[:, :8]

    rows = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    method = Careless(nn.Sequential(nn.Flatten(1), nn.Linear(12, 12), rows), 12, projector=(8, 8))
    recompute_blocks(method)
    x = torch.randn(4, 3, 2, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        method(x, x)["z1"].sum().backward()


TRACKS = {"pretrain": (pretrain.main, TINY_PRETRAIN), "classify": (classify.main, TINY_CLASSIFY)}
SHORT = ("steps=4", "deterministic=true", "resume=auto", "eval.protocols=[]")


@pytest.mark.parametrize("more", [(), ("precision=bf16",), ("chunk_size=48",)])
@pytest.mark.parametrize("track", TRACKS)
def test_a_run_is_the_plain_one_and_says_what_it_did(tmp_path, monkeypatch, track, more):
    monkeypatch.chdir(tmp_path)
    main, words = TRACKS[track]
    records = []
    for recompute in ("none", "blocks"):
        assert main([*words, *SHORT, *more, f"recompute={recompute}", f"run_dir={recompute}"]) == 0
        record = json.loads((tmp_path / recompute / "run.json").read_text())
        rows = [
            {k: v for k, v in row.items() if "seconds" not in k and "per_second" not in k}
            for row in metrics(tmp_path / recompute)
        ]
        records.append((record["identity"], rows, (tmp_path / recompute / "backbone.safetensors").read_bytes()))
        expected = {"none": [], "blocks": ["backbone", "projector"] if track == "pretrain" else ["backbone"]}
        assert record["recomputed"] == expected[recompute]
        assert record["batch_norm_computed"] == "by torch's kernel (cpu)"
    assert records[0] == records[1]


@pytest.mark.slow
@pytest.mark.parametrize("track", TRACKS)
def test_a_run_on_two_processes_is_the_plain_one(tmp_path, track):
    files = []
    for recompute in ("none", "blocks"):
        words = (*TRACKS[track][1], *SHORT, f"recompute={recompute}", f"run_dir={recompute}")
        done = run(script(track, words, 2), tmp_path)
        assert done.returncode == 0, done.stderr
        files.append((tmp_path / recompute / "backbone.safetensors").read_bytes())
        record = json.loads((tmp_path / recompute / "run.json").read_text())
        assert record["batch_norm_computed"] == "by plain operations (cpu)"
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["compile=true"], "error: recompute must be none with compile=true, got blocks"),
        (["cuda_graphs=true"], "error: cuda_graphs must be null or false, got true: the device is cpu"),
        (["recompute=all"], "error: recompute must be 'none' or 'blocks', got 'all'"),
    ],
)
def test_what_it_does_not_go_with_is_refused(capsys, words, error):
    assert fails(capsys, pretrain.main, ["data=digits", "device=cpu", "recompute=blocks", *words]) == error
