"""Selection of the backend by argument, environment and device; unavailable backends raise, without fallback."""

from __future__ import annotations

import importlib.util
import json
import shutil
from functools import partial

import pytest
import torch
from safetensors import safe_open
from tiny import TINY, run

import dit_accel
from dit_accel import TokenLayout
from dit_accel.functional import clear_attention, gna_attention, llsa_attention, sla_attention
from dit_accel.mechanisms._operator import _check_gpu
from dit_accel.mechanisms.backend import resolve
from dit_accel.mechanisms.registry import PROCESSORS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NEEDED = {"sla": {}, "clear": {"radius": 3}, "llsa": {}, "gna": {"window": 3}}
FUNCTIONS = {"sla": sla_attention, "clear": clear_attention, "llsa": llsa_attention, "gna": gna_attention}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("DIT_ACCEL_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def machine(monkeypatch):
    """A machine with triton and a C compiler, regardless of this one."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return monkeypatch


@pytest.mark.parametrize("name", FUNCTIONS)
def test_default_is_triton_on_a_gpu_and_torch_elsewhere(name, machine):
    assert resolve(None, CPU, PROCESSORS[name]) == "torch"
    assert resolve(None, torch.device("mps"), PROCESSORS[name]) == "torch"
    assert resolve(None, GPU, PROCESSORS[name]) == "triton"


def test_argument_overrides_environment(machine):
    machine.setenv("DIT_ACCEL_BACKEND", "torch")
    assert resolve(None, GPU, PROCESSORS["gna"]) == "torch"
    assert resolve("triton", GPU, PROCESSORS["gna"]) == "triton"
    machine.setenv("DIT_ACCEL_BACKEND", "")
    assert resolve(None, GPU, PROCESSORS["gna"]) == "triton"


def test_unknown_names_give_a_suggestion_and_all_names(monkeypatch):
    with pytest.raises(ValueError, match=r"unknown backend 'tritn'; did you mean 'triton'\? .* torch, triton"):
        resolve("tritn", CPU, PROCESSORS["sla"])
    monkeypatch.setenv("DIT_ACCEL_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"unknown DIT_ACCEL_BACKEND 'cuda'.* torch, triton"):
        resolve(None, CPU, PROCESSORS["sla"])
    with pytest.raises(TypeError, match="backend must be one of"):
        resolve(3, CPU, PROCESSORS["sla"])  # type: ignore[arg-type]


def test_llsa_does_not_support_flex(machine):
    with pytest.raises(ValueError, match=r"backend=flex: llsa does not support this backend; available: torch, triton"):
        resolve("flex", GPU, PROCESSORS["llsa"])
    machine.setenv("DIT_ACCEL_BACKEND", "flex")
    with pytest.raises(ValueError, match=r"DIT_ACCEL_BACKEND=flex: llsa does not support this backend"):
        resolve(None, CPU, PROCESSORS["llsa"])


def test_linfusion_uses_torch_on_every_device(machine):
    assert resolve(None, CPU, PROCESSORS["linfusion"]) == resolve(None, GPU, PROCESSORS["linfusion"]) == "torch"
    with pytest.raises(ValueError, match=r"backend=triton: linfusion does not support this backend; available: torch"):
        resolve("triton", GPU, PROCESSORS["linfusion"])


@pytest.mark.parametrize("name", ["sla", "clear", "gna"])
def test_flex_is_available_on_any_device(name):
    assert resolve("flex", CPU, PROCESSORS[name]) == resolve("flex", GPU, PROCESSORS[name]) == "flex"


def test_triton_on_the_cpu_needs_its_interpreter(machine):
    with pytest.raises(ValueError, match=r"needs a GPU, got tensors on cpu.*TRITON_INTERPRET=1"):
        resolve("triton", CPU, PROCESSORS["sla"])
    machine.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton", CPU, PROCESSORS["sla"]) == "triton"
    assert resolve(None, CPU, PROCESSORS["sla"]) == "torch"
    with pytest.raises(ValueError, match="got tensors on mps"):
        resolve("triton", torch.device("mps"), PROCESSORS["sla"])


@pytest.mark.parametrize("requested", [None, "triton"])
def test_missing_requirements_of_triton_are_reported(requested, machine):
    machine.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs a C compiler and found none.*DIT_ACCEL_BACKEND=torch"):
        resolve(requested, GPU, PROCESSORS["clear"])
    machine.setenv("CC", "cc-of-mine -m64")
    machine.setattr(shutil, "which", lambda name: name if name == "cc-of-mine" else None)
    assert resolve(requested, GPU, PROCESSORS["clear"]) == "triton"
    machine.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"package triton, which is not installed"):
        resolve(requested, GPU, PROCESSORS["clear"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_processors_check_the_backend(name):
    layout, qkv = TokenLayout((4, 4)), [torch.randn(1, 1, 16, 16) for _ in range(3)]
    want = FUNCTIONS[name](*qkv, layout, **NEEDED[name])
    assert torch.equal(FUNCTIONS[name](*qkv, layout, **NEEDED[name], backend="torch"), want)
    with pytest.raises(ValueError, match="did you mean 'torch'"):
        FUNCTIONS[name](*qkv, layout, **NEEDED[name], backend="troch")
    with pytest.raises(ValueError, match="did you mean 'torch'"):
        PROCESSORS[name](**NEEDED[name], backend="troch")
    with pytest.raises(ValueError, match="needs a GPU"):
        FUNCTIONS[name](*qkv, layout, **NEEDED[name], backend="triton")
    assert "backend" not in PROCESSORS[name](**NEEDED[name], backend="torch").options()


def patched(monkeypatch, name, **replacements):
    """Patch the mechanism's computation per backend: functions (plain computation, inputs)."""
    kind, plain = PROCESSORS[name], PROCESSORS[name].compute

    def compute(self, backend, inputs):
        if backend in replacements:
            return replacements[backend](partial(plain, self, "torch"), inputs)
        return plain(self, backend, inputs)

    monkeypatch.setattr(kind, "compute", compute)


@pytest.mark.parametrize("name", ["sla", "clear", "gna"])
def test_environment_is_read_per_call_and_flex_backward_is_torch(name, monkeypatch):
    """Each backend has its own factor on the output, which gradients of flex must not have."""
    lse = torch.zeros(1, 1, 16)
    patched(monkeypatch, name, triton=lambda plain, x: (2 * plain(x), lse), flex=lambda plain, x: 3 * plain(x))
    layout, qkv = TokenLayout((4, 4)), [torch.randn(1, 1, 16, 16, requires_grad=True) for _ in range(3)]
    want = FUNCTIONS[name](*qkv, layout, **NEEDED[name])
    wanted = torch.autograd.grad(want.sum(), qkv)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for factor, backend in ((2, "triton"), (3, "flex"), (1, "torch")):
        monkeypatch.setenv("DIT_ACCEL_BACKEND", backend)
        got = FUNCTIONS[name](*qkv, layout, **NEEDED[name])
        torch.testing.assert_close(got, factor * want)
        if backend == "triton":
            continue
        for grad, expected in zip(torch.autograd.grad(got.sum(), qkv), wanted, strict=True):
            assert torch.equal(grad, expected)


def raising(monkeypatch, name, backend, error):
    """A call of the mechanism, patched so that this backend raises the error."""

    def fail(plain, inputs):
        raise error

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    patched(monkeypatch, name, **{backend: fail})
    layout, qkv = TokenLayout((4, 4), 2), [torch.randn(1, 3, 18, 16) for _ in range(3)]
    return lambda: FUNCTIONS[name](*qkv, layout, **NEEDED[name], backend=backend)


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")


@pytest.mark.parametrize(
    "name, backend", [(name, "torch") for name in FUNCTIONS] + [("sla", "triton"), ("gna", "triton")]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_out_of_memory_error_names_mechanism_and_shape(name, backend, compiled, monkeypatch):
    call = raising(monkeypatch, name, backend, FULL)
    call = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{name} (backend {backend})") and "(1, 3, 18, 16) in float32" in message
    assert message.endswith("Tried to allocate 4.00 GiB.") and caught.value.__cause__ is FULL
    assert ('backend="triton"' in message) == (backend == "torch")


def test_out_of_memory_error_names_the_backward_pass(monkeypatch):
    q = torch.randn(1, 3, 16, 16, requires_grad=True)
    out = gna_attention(q, q, q, TokenLayout((4, 4)), window=3)

    def full(*args, **options):
        raise FULL

    with monkeypatch.context() as patch:
        patched(patch, "gna", torch=full)
        with pytest.raises(torch.OutOfMemoryError, match=r"gna \(backend torch\).*Tried to allocate 4.00 GiB"):
            out.sum().backward(retain_graph=True)

    class Leaky(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(full)

    patched(monkeypatch, "gna", torch=lambda plain, x: plain(x._replace(query=Leaky.apply(x.query))))
    with pytest.raises(torch.OutOfMemoryError, match=r"the backward pass of gna .*\(1, 3, 16, 16\) in float32"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["sla", "gna"])
def test_out_of_shared_memory_error_gives_advice(name, monkeypatch):
    from triton.runtime.errors import OutOfResources

    call = raising(monkeypatch, name, "triton", OutOfResources(262144, 101376, "shared memory"))
    with pytest.raises(RuntimeError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{name}: a Triton kernel for head dim 16 in float32 needs 262144 bytes of shared memory")
    assert "has 101376: convert to float16 or bfloat16, or choose" in message and "DIT_ACCEL_BACKEND=torch" in message
    assert 'backend="flex"' in message and isinstance(caught.value.__cause__, OutOfResources)


def test_other_errors_are_not_changed(monkeypatch):
    error = RuntimeError("of another kind")
    with pytest.raises(RuntimeError) as caught:
        raising(monkeypatch, "gna", "torch", error)()
    assert caught.value is error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpus_before_ampere_are_rejected(dtype, monkeypatch):
    class OnGpu:
        device, dtype = GPU, torch.float16

    OnGpu.dtype = dtype
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"sla: .*8\.0 .*Tesla T4 has 7\.5.*DIT_ACCEL_BACKEND=torch") as caught:
        _check_gpu("sla", "triton", OnGpu)
    assert ("no bfloat16" in str(caught.value)) == (dtype == torch.bfloat16)
    _check_gpu("sla", "torch", OnGpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    _check_gpu("sla", "triton", OnGpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    _check_gpu("sla", "triton", OnGpu)


def test_processor_passes_its_backend_and_describe_shows_it():
    model, inputs = TINY["wan"](), TINY["wan"].inputs((3, 5, 6))
    dit_accel.set_attn_processor(model, dit_accel.GNAAttnProcessor(window=3))
    header, _, row = dit_accel.describe(model).splitlines()
    assert row[header.index("backend") :].split()[0] == "torch" and "cannot run" not in row
    dit_accel.set_attn_processor(model, dit_accel.GNAAttnProcessor(window=3, backend="triton"))
    assert "needs a GPU" in dit_accel.describe(model)
    with pytest.raises(ValueError, match="needs a GPU"):
        run(model, inputs)
    dit_accel.set_attn_processor(model, dit_accel.GNAAttnProcessor(window=3, backend="torch", min_tokens=1000))
    run(model, inputs)
    header, _, row = dit_accel.describe(model).splitlines()
    assert row[header.index("backend") : header.index("tokens")].strip() == "" and "dense: 90 tokens" in row


def test_describe_shows_triton_if_the_model_is_on_a_gpu(machine):
    model = TINY["wan"]()
    dit_accel.set_attn_processor(model, dit_accel.GNAAttnProcessor(window=3))

    class Hook:  # stands for accelerate's hook on an offloaded model
        execution_device = GPU

    model._hf_hook = Hook()
    header, _, row = dit_accel.describe(model).splitlines()
    assert row[header.index("backend") :].split()[0] == "triton"


def test_backend_is_not_saved(tmp_path):
    model = TINY["wan"]()
    dit_accel.set_attn_processor(model, dit_accel.SLAAttnProcessor(critical=0.2, backend="torch"), layers="blocks.0")
    dit_accel.set_attn_processor(model, dit_accel.SLAAttnProcessor(critical=0.2), layers="blocks.1")
    file = dit_accel.save_attention(model, tmp_path)
    with safe_open(file, framework="pt") as saved:
        configuration = json.loads(saved.metadata()["dit_accel"])
    (entry,) = configuration["components"]["transformer"]["attention"]
    assert "backend" not in entry["options"] and len(entry["layers"]) == 2
    other = TINY["wan"]()
    dit_accel.load_attention(other, tmp_path)
    assert other.blocks[0].attn1.dit_accel.mechanism == dit_accel.SLAAttnProcessor(critical=0.2)


def test_command_line_accepts_a_backend():
    from dit_accel.mechanisms.attn_spec import parse_attention

    assert parse_attention("sla:backend=torch").processor().backend == "torch"
    assert parse_attention("sla:backend=none").processor().backend is None
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        parse_attention("sla:backend=tritn")
