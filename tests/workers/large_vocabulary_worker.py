"""What test_memory_estimate.py runs alone: ``dts-hf doctor`` on a tiny Gemma 3 with 262,144 ids, in the current folder."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from dts_hf.doctor.run import diagnose

VOCAB = 262_144


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, their pairs, and as many triples as there is room for: as large in memory as a trained one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(itertools.product(letters, letters))
    triples = itertools.product(map("".join, pairs), letters[:4])
    specials = ["<pad>", "<eos>", "<bos>"]
    merges = [*pairs, *itertools.islice(triples, VOCAB - len(specials) - len(letters) - len(pairs))]
    words = [*specials, *letters, *map("".join, merges)]
    backend = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def main(out: Path, student_dtype: str) -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained("teacher")
    tokenizer().save_pretrained("teacher")
    rows = [{"instruction": f"Count to {number}", "input": "", "output": "one two three"} for number in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": {"init": {"from": "teacher", "layers": 1}, "dtype": student_dtype},
        "teacher": {"model": "teacher", "dtype": student_dtype},
        "data": {"train": "rows.jsonl", "prompt_template": "plain"},
        "training": {"use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
        "output": {"dir": "run"},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    out.write_text(json.dumps(diagnose("recipe.yaml").as_dict()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
