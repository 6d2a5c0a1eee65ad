"""TRL's SFTTrainer on the labels that `export` writes, as they stand; run by `make interop`."""

import polars as pl
import pytest
import torch
from synthetic import make_tables, write_run
from tiny_models import tiny_model

import tip_analysis as tip
from tip_analysis.demo.arithmetic.tokenizer import build_tokenizer


@pytest.mark.interop
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")
def test_sft_trains_on_exported_labels_without_glue(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import load_dataset

    run = write_run(tmp_path / "run", make_tables(num_prompts=4, rollouts_per_prompt=2))
    tip.export(run, tmp_path / "flat")
    (path, *_) = sorted((tmp_path / "flat" / "labels").iterdir())
    table = pl.read_parquet(path)
    vocabulary = table["input_ids"].explode().max() + 1
    model = tiny_model(vocab_size=vocabulary)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = load_dataset(str(tmp_path / "flat"), f"labels-{path.stem}", split="train")
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=table.height,
            max_steps=1,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=build_tokenizer(),
    )
    trainer.train()
    (found,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    changed = [not torch.equal(value, before[name]) for name, value in model.state_dict().items()]
    assert any(changed)
    model.load_state_dict(before)
    losses = []
    for row in table.iter_rows(named=True):  # the selected tokens, one by one
        logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for at, label in enumerate(row["labels"]):
            if label != -100:
                losses.append(-logits[at - 1, label].item())
    assert len(losses) == sum(sum(mask) for mask in table["selected"].to_list()) > 0
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-4)
