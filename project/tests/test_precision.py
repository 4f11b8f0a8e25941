import pytest
import torch

from cwdm.precision import choose_dtype, exact_float32

KERNELS_ASK = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")]


def switches() -> list[str]:
    """What every product of float32 is computed in, and whether the old names can be read and what they say."""
    found = [torch._C._get_fp32_precision_getter(*switch) for switch in (("generic", "all"), *KERNELS_ASK)]
    for old in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        try:
            found.append(str(old()))
        except RuntimeError:
            found.append("mixed")
    return found


def set_new(backend: str, op: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(backend, op, value)


CHANGES = {
    "nothing": lambda: None,
    "generic tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "generic ieee": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
    "generic bf16": lambda: setattr(torch.backends, "fp32_precision", "bf16"),
    "cudnn": lambda: setattr(torch.backends.cudnn, "fp32_precision", "tf32"),
    "cudnn.conv ieee": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "cudnn.conv tf32": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32"),
    "cudnn.rnn": lambda: setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee"),
    "cuda.matmul": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "mkldnn": lambda: set_new("mkldnn", "all", "bf16"),
    "mkldnn.conv": lambda: setattr(torch.backends.mkldnn.conv, "fp32_precision", "bf16"),
    "mkldnn.matmul": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "tf32"),
    "old cudnn": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "old matmul": lambda: torch.set_float32_matmul_precision("high"),
    "old and new": lambda: (torch.set_float32_matmul_precision("medium"), set_new("cuda", "matmul", "ieee")),
}


@pytest.fixture
def as_it_was():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for switch in (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul")):
        set_new(*switch, "none")
    for op in ("matmul", "conv", "rnn"):
        set_new("mkldnn", op, "none")


@pytest.mark.usefixtures("as_it_was")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_products_are_exact_inside_and_as_they_were_afterwards(change) -> None:
    change()
    before = switches()
    with exact_float32():
        assert {torch._C._get_fp32_precision_getter(*switch) for switch in KERNELS_ASK} == {"ieee"}
    assert switches() == before
    # A switch that said nothing of its own still follows the general one.
    torch.backends.fp32_precision = "tf32"
    followed = switches()
    torch.backends.fp32_precision = "none"
    with exact_float32():
        pass
    torch.backends.fp32_precision = "tf32"
    assert switches() == followed


def test_several_threads_may_be_inside_in_any_order() -> None:
    before = switches()
    first, second = exact_float32(), exact_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert switches() == before


def fail_inside() -> None:
    with exact_float32():
        raise KeyError


def test_an_error_inside_leaves_nothing_behind() -> None:
    before = switches()
    with pytest.raises(KeyError):
        fail_inside()
    assert switches() == before


def test_a_processor_with_bfloat16_stays_with_float32_unless_asked() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == choose_dtype("fp32", cpu) == torch.float32
    assert choose_dtype("bf16", cpu) == torch.bfloat16
