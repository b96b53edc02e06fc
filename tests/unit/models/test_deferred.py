"""Models made without weights: what is read later is what would have been loaded."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from align.models import deferred, forward, sharding
from align.models.load import load_causal_lm, load_scalar_model

FAMILIES = tiny.families()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, model in FAMILIES.items():
        model.save_pretrained(folder / name, max_shard_size="20KB" if name == "qwen3" else "5GB")
    return folder


@pytest.fixture
def alone(tmp_path: Path):
    """A process group of this process alone, in which FSDP2 shards as ever."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sharded_model_reads_its_weights_and_computes_the_same(folders: Path, name: str, alone) -> None:
    whole = load_causal_lm(str(folders / name)).eval()
    with deferred.weights():
        model = load_causal_lm(str(folders / name))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    sharding.shard(model.eval(), alone, device=torch.device("cpu"))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in whole.named_parameters()]  # ties are kept
    for (_, one), (_, other) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(one.full_tensor(), other)
    ids = torch.randint(3, tiny.VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9).expand(3, -1) > 2
    with torch.no_grad(), sharding.gathered(model):
        found = forward.token_logprobs(model, ids, mask)
    with torch.no_grad():
        assert torch.equal(found, forward.token_logprobs(whole, ids, mask))
    assert model.generation_config.eos_token_id == tiny.EOS
    assert sharding.whole_weights(model).keys() == sharding.tensors_once(whole).keys()


def test_a_new_head_is_drawn_as_ever(folders: Path, alone) -> None:
    whole = load_scalar_model(str(folders / "llama-tied"), seed=3)
    with deferred.weights():
        model = load_scalar_model(str(folders / "llama-tied"), seed=3)
    sharding.shard(model.hf, alone, device=torch.device("cpu"))
    assert torch.equal(model.head.weight.full_tensor(), whole.head.weight)  # type: ignore[operator]
    ids, lengths = torch.arange(3, 15).reshape(2, 6), torch.tensor([6, 4])
    with torch.no_grad():
        assert torch.equal(forward.final_scores(model, ids, lengths), forward.final_scores(whole, ids, lengths))


def test_weights_under_other_names_are_loaded_whole(folders: Path, tmp_path: Path) -> None:
    torch.save(FAMILIES["gpt2"].state_dict(), tmp_path / "pytorch_model.bin")
    FAMILIES["gpt2"].config.save_pretrained(tmp_path)
    with deferred.weights():
        model = load_causal_lm(str(tmp_path))
    assert deferred.source_of(model) is None and not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model.get_input_embeddings().weight, FAMILIES["gpt2"].get_input_embeddings().weight)


def test_a_model_without_blocks_is_refused(alone) -> None:
    model = tiny.llama()
    model._no_split_modules = None
    with pytest.raises(ValueError, match="does not say what its blocks are"):
        sharding.shard(model, alone, device=torch.device("cpu"))


def test_a_model_that_keeps_buffers_in_its_files_is_loaded_whole(folders: Path) -> None:
    class Factory:
        """Makes a model with a buffer that training does not change but files hold."""

        @staticmethod
        def from_config(config, dtype):
            model = type(FAMILIES["llama-tied"])(config)
            model.register_buffer("scale", torch.ones(()), persistent=True)
            return model

    def made(path: Path):
        return deferred.make(Factory, str(path), config=FAMILIES["llama-tied"].config, dtype=torch.float32)

    assert made(folders / "llama-tied") is not None  # its files have no such buffer: it is what the code makes it
    tensors = {name: one.clone() for name, one in FAMILIES["llama-tied"].state_dict().items()}
    (folders / "scaled").mkdir()
    save_file({**tensors, "scale": torch.tensor(0.5)}, folders / "scaled" / "model.safetensors")
    assert made(folders / "scaled") is None
