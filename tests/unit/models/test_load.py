"""Loading and saving: folders that transformers made load here, and the other way round."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align import seeds
from align.atomic import folder_written_whole
from align.models import forward
from align.models.heads import initialise_head
from align.models.load import load_causal_lm, load_scalar_model, load_tokenizer, save_model


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tiny.gpt2().save_pretrained(tmp_path / "gpt2")
    tiny.tokenizer().save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


def test_a_saved_model_is_the_same_in_plain_transformers(folder: str, tmp_path: Path) -> None:
    model = load_causal_lm(folder)
    save_model(model, load_tokenizer(folder), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == tiny.EOS


def test_dropout_of_the_folders_config_is_off(folder: str) -> None:
    model = load_causal_lm(folder)
    assert model.training
    ids = torch.randint(3, tiny.VOCAB, (2, 9))
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_residual_dropout_acts_in_training_only(folder: str) -> None:
    plain, dropping = load_causal_lm(folder), load_causal_lm(folder, dropout=0.2)
    ids = torch.randint(3, tiny.VOCAB, (2, 9))
    assert not torch.equal(dropping(ids).logits, dropping(ids).logits)
    dropping.eval()
    assert torch.equal(dropping(ids).logits, plain(ids).logits)


def test_residual_dropout_zeroes_a_fifth_of_each_block(folder: str) -> None:
    model, seen = load_causal_lm(folder, dropout=0.2), []
    model.transformer.h[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(torch.randint(3, tiny.VOCAB, (16, 50)))
    assert float((seen[0] == 0).float().mean()) == pytest.approx(0.2, abs=0.01)


def test_a_new_head_has_variance_one_over_d_plus_one() -> None:
    head = torch.nn.Linear(255, 64)
    initialise_head(head, seeds.generator(0, "head"))
    assert float(head.weight.var()) == pytest.approx(1 / 256, rel=0.03)
    assert head.bias is not None and not head.bias.any()


def test_head_seed_decides_the_head(folder: str) -> None:
    first, same, other = (load_scalar_model(folder, seed=seed).hf.score.weight for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_reward_folder_brings_head_and_bias_and_loads_in_transformers(folder: str, tmp_path: Path) -> None:
    model = load_scalar_model(folder)
    model.bias = 1.25
    save_model(model, load_tokenizer(folder), tmp_path / "reward")
    again = load_scalar_model(str(tmp_path / "reward"), seed=9)
    ids, lengths = torch.randint(3, tiny.VOCAB, (3, 8)), torch.tensor([8, 8, 8])
    with torch.no_grad():
        ours = forward.final_scores(again, ids, lengths)
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()(ids).logits[:, 0]
    assert again.bias == 1.25
    torch.testing.assert_close(ours, forward.final_scores(model, ids, lengths))
    torch.testing.assert_close(ours, plain - 1.25, rtol=1e-4, atol=1e-5)


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    config = tiny.llama().config
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="3 labels"):
        load_scalar_model(str(tmp_path))


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no EOS token"):
        load_tokenizer(str(tmp_path))


def test_gradient_checkpointing_changes_no_gradient(folder: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load_causal_lm(folder, gradient_checkpointing=checkpointing)
        episodes = tiny.completions([3, 5], [4, 4])
        forward.token_logprobs(model, episodes.ids, episodes.token_mask).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "hf"
    with folder_written_whole(target) as fresh:
        (fresh / "file").write_text("good")
    with pytest.raises(RuntimeError), folder_written_whole(target) as fresh:
        (fresh / "file").write_text("half")
        raise RuntimeError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (target / "file").read_text() == "good"
    with folder_written_whole(target) as fresh:
        (fresh / "file").write_text("new")
    assert (target / "file").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["hf"]
