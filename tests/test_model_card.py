"""The model card of an export: huggingface_hub reads it, and what it tells a reader to run runs."""

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import TEXT_RECIPES, Case, build_text, picture
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from test_to_hf import export, import_, make_peft

from e5v_jax import E5V
from e5v_jax.checkpoints import to_hf
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.trained_with import TrainedWith
from e5v_jax.evaluate.report import Report, Row, write_report

TEXT = "a dog asleep on a sofa"
RUN = {
    "config": {
        "data": {"path": ["/home/me/data/nli_for_simcse.csv"], "tfds": None, "prompt": "text"},
        "optimizer": {"learning_rate": 4e-4},
        "loss": {"temperature": 0.05},
        "lora": {"rank": 3},
        "batch_size": 768,
    }
}


def read(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def programs(card: ModelCard) -> dict[str, str]:
    """The programs by their library, each after the prompts, which it may name."""
    (prompts,) = re.findall(r"(?ms)^```python\n(PROMPTS = .*?)^```$", card.text)
    found = re.findall(r"(?ms)^\*\*([^*\n]+)\*\*\n\n```python\n(.*?)^```$", card.text)
    return {name: prompts + code for name, code in found}


def run(code: str, folder: Path) -> dict[str, Any]:
    """The names that a program leaves, run beside the export."""
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        exec(code, names)
    return names


def pictured(folder: Path) -> Any:
    image = picture(40, 60)
    image.save(folder / "dog.png")  # without loss, whatever its name says
    (folder / "dog.png").rename(folder / "dog.jpg")
    return image


def scores(folder: Path, adapter: str | None = None) -> Path:
    """The output folder of an evaluation."""
    folder.mkdir()
    rows = [
        Row("stsb", "STS-B", "Spearman", "1379", 81.234, 79.0, 83.456),
        Row("coco", "COCO | 5k", "image R@1", "300 of 1500", 40.0, 35.5, 44.5),
    ]
    settings = {"model": "/home/me/ours", "adapter": adapter, "dtype": "float32", "jax": "0.10.2"}
    write_report(Report(settings, rows), folder)
    return folder


@pytest.fixture(params=["text", pytest.param("llava", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest, llava: Callable[[str], Case], tmp_path: Path) -> Case:
    if request.param == "text":
        return build_text(TEXT_RECIPES["llama"], tmp_path / "hf")
    return llava("llama-gqa")


@pytest.fixture
def text(tmp_path: Path) -> Case:
    return build_text(TEXT_RECIPES["llama"], tmp_path / "hf")


def test_a_model_in_five_libraries(case: Case, tmp_path: Path) -> None:
    export(import_(case.folder, tmp_path / "ours"), tmp_path / "mine")
    card, image = read(tmp_path / "mine"), pictured(tmp_path)
    found = programs(card)
    assert list(found) == [
        "e5v-jax",
        "sentence-transformers 6",
        "transformers 5",
        "PEFT, to train on from here",
        "vLLM",
    ]
    shows = "image" in ConvertedFolder(tmp_path / "ours").config.modalities
    both = {"image": image, "text": "now awake"}
    items = [TEXT, image, both] if shows else [TEXT, "a puppy naps on a couch"]
    model = E5V.from_pretrained(tmp_path / "ours", dtype="float32")
    expected = model.encode(items)
    ours = run(found["e5v-jax"], tmp_path)["vectors"]  # bfloat16, as it is by default
    assert (np.sum(ours * expected, axis=1) > 0.99).all()
    theirs = np.stack(run(found["sentence-transformers 6"], tmp_path)["vectors"])
    assert (np.sum(theirs * expected, axis=1) > 0.9999).all()
    np.testing.assert_allclose(theirs, expected, atol=2e-5)
    vector = run(found["transformers 5"], tmp_path)["vector"].numpy()
    np.testing.assert_allclose(vector[0], expected[2 if shows else 0], atol=2e-5)
    tuned = run(found["PEFT, to train on from here"], tmp_path)["model"]
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    layers = ConvertedFolder(tmp_path / "ours").config.text.num_hidden_layers
    assert len(trained) == 2 * 7 * layers and not any("vision" in name for name in trained)
    compile(found["vLLM"], "vLLM", "exec")  # its prompts are those that it is given:
    prompts = run(found["vLLM"].split("from ")[0], tmp_path)["PROMPTS"]
    measured = model.load_processor(tmp_path / "ours").measure(items, model.preset.choose())
    texts = [TEXT, "", "now awake"]  # the image's prompt has no place for one
    for prompt, text, item in zip(prompts.values(), texts, measured, strict=False):
        assert case.tokenizer(prompt.replace("{text}", text))["input_ids"] == item.ids


def test_an_adapter_in_five_libraries(case: Case, tmp_path: Path) -> None:
    make_peft(case, tmp_path / "trained")
    ours = import_(case.folder, tmp_path / "ours")
    export(ours, tmp_path / "mine", adapter=tmp_path / "trained", peft=True)
    card, image = read(tmp_path / "mine"), pictured(tmp_path)
    (tmp_path / "BASE").symlink_to(case.folder)
    found = programs(card)
    libraries = ["e5v-jax", "PEFT", "transformers 5", "sentence-transformers 6", "vLLM"]
    assert list(found) == libraries
    shows = "image" in ConvertedFolder(ours).config.modalities
    item = {"image": image, "text": "now awake"} if shows else TEXT
    model = E5V.from_pretrained(ours, adapter=tmp_path / "trained", dtype="float32")
    expected = model.encode([item, TEXT])
    plain = case.torch_embed([item])
    assert np.abs(plain[0] - expected[0]).max() > 1e-2  # the adapter does something
    vectors = run(found["e5v-jax"], tmp_path)["vectors"]
    assert vectors[-1 if shows else 0] @ expected[0] > 0.99
    if shows:  # transformers' own processor needs its file, which this checkpoint has not
        case.processor.save_pretrained(tmp_path / "processor")
        folder = tmp_path / "with processor"
        folder.mkdir()
        for file in (*case.folder.iterdir(), *(tmp_path / "processor").iterdir()):
            with contextlib.suppress(FileExistsError):
                (folder / file.name).symlink_to(file)
        (tmp_path / "BASE").unlink()
        (tmp_path / "BASE").symlink_to(folder)
    for name in ("PEFT", "transformers 5"):
        vector = run(found[name], tmp_path)["vector"].numpy()
        np.testing.assert_allclose(vector[0], expected[0], atol=2e-5)
    (commands,) = re.findall(r"(?ms)^```\n(e5v-convert.*?)^```$", card.text)
    convert, merge = (line.split() for line in commands.splitlines())
    assert convert == ["e5v-convert", "BASE", "mine-base"]
    assert merge == ["e5v-export", "mine-base", "mine-merged", "--adapter", "mine"]
    import_(case.folder, tmp_path / "mine-base")
    export(tmp_path / "mine-base", tmp_path / "mine-merged", adapter=tmp_path / "mine")
    vectors = run(found["sentence-transformers 6"], tmp_path)["vectors"]
    np.testing.assert_allclose(vectors[0], expected[1], atol=2e-5)


def test_what_the_hub_reads(llava: Callable[[str], Case], tmp_path: Path) -> None:
    """Base model, data and scores, of a run on a model of the hub; no path of this machine."""
    case = llava("llama-gqa")
    ours = import_(case.folder, tmp_path / "ours")
    info = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps({**info, "source": "royokong/e5-v"}))
    make_peft(case, tmp_path / "run/adapter")
    (tmp_path / "run/run.json").write_text(json.dumps(RUN))
    measured = scores(tmp_path / "scores", str(tmp_path / "run"))
    for peft in (True, False):
        folder = tmp_path / f"mine-{peft}"
        export(ours, folder, adapter=tmp_path / "run", peft=peft, scores=measured)
        card = read(folder)
        data = card.data
        assert data.base_model == "royokong/e5-v"
        assert data["base_model_relation"] == ("adapter" if peft else "finetune")
        assert data.datasets == ["princeton-nlp/datasets-for-simcse"]
        assert data.license == "other" and data.license_link.endswith("/royokong/e5-v")
        assert data.library_name == ("peft" if peft else "sentence-transformers")
        assert data.pipeline_tag == "feature-extraction"
        assert {"e5-v", "lora" if peft else "sentence-transformers"} <= set(data.tags)
        assert data.model_name == folder.name
        first, second = data.eval_results
        assert (first.dataset_type, first.metric_type, first.metric_value) == (
            *("stsb", "spearman", 81.23),
        )
        assert first.metric_name == "Spearman, 95 % interval 79.00 to 83.46"
        assert (second.dataset_name, second.metric_type) == ("COCO | 5k", "image_r_1")
        assert "| STS-B | Spearman | 1379 | 81.23 | 79.00 to 83.46 |" in card.text
        assert r"| COCO \| 5k | image R@1 |" in card.text
        assert "| data | `nli_for_simcse.csv` |" in card.text and "| LoRA rank | 3 |" in card.text
        assert "/home/me" not in card.content and str(tmp_path) not in card.content
        assert ModelCard(card.content).data.to_dict() == data.to_dict()
    assert "royokong/e5-v" in programs(read(tmp_path / "mine-True"))["PEFT"]


def test_without_scores_or_a_run_it_says_so(text: Case, tmp_path: Path) -> None:
    folder = export(import_(text.folder, tmp_path / "ours"), tmp_path / "mine")
    card = read(folder)
    assert "nothing was measured" in card.text and card.data.eval_results is None
    assert card.data.base_model is None and "None for this export" in card.text
    assert str(tmp_path) not in card.content


def test_scores_of_something_else_are_refused(llava: Callable[[str], Case], tmp_path: Path) -> None:
    case = llava("llama-gqa")
    make_peft(case, tmp_path / "adapter")
    ours = import_(case.folder, tmp_path / "ours")
    bare, with_one = scores(tmp_path / "bare"), scores(tmp_path / "with", "runs/mine")
    for measured, adapter, said in (
        (bare, tmp_path / "adapter", "measured without an adapter"),
        (with_one, None, "measured with the adapter runs/mine"),
        (tmp_path / "none", None, "results.json: not found"),
    ):
        error = FileNotFoundError if measured.name == "none" else ValueError
        with pytest.raises(error, match=said):
            export(ours, tmp_path / "mine", adapter=adapter, scores=measured)
        assert not (tmp_path / "mine").exists()
    file = bare / "results.json"
    content = json.loads(file.read_text())
    for change in ({"value": float("nan")}, {"low": "79"}, {"metric": None}):
        row = {**content["results"][0], **change}
        file.write_text(json.dumps({**content, "results": [row]}))
        with pytest.raises(ValueError, match=rf"results\[0\]: {next(iter(change))} is"):
            export(ours, tmp_path / "mine", scores=bare)
    file.write_text(json.dumps({**content, "results": []}))
    with pytest.raises(ValueError, match="at least one"):
        export(ours, tmp_path / "mine", scores=bare)


def test_a_readme_that_is_there_stays(text: Case, tmp_path: Path) -> None:
    """Nothing of the exporter's own can meet one: whoever writes a card into a folder can."""
    folder = export(import_(text.folder, tmp_path / "ours"), tmp_path / "mine")
    whole = (folder / "README.md").read_text()
    source = ConvertedFolder(tmp_path / "ours")
    usage = to_hf.Usage("mine", source.table, False, False, None, "no tokenizer")
    card = to_hf.ModelCard(usage, source, None)
    (folder / "README.md").write_text("mine")
    assert not card.write(folder)
    assert (folder / "README.md").read_text() == "mine"
    (folder / "README.md").unlink()
    assert card.write(folder)
    assert "could not be told from the model folder: no tokenizer" in read(folder).text
    assert (folder / "README.md").read_text() != whole
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_the_prompt_of_training_is_in_the_export(text: Case, tmp_path: Path) -> None:
    """An adapter trained with another one: what is merged renders it, and the card shows it."""
    make_peft(text, tmp_path / "adapter")
    TrainedWith(prompt="plain").write(tmp_path / "adapter")
    ours = import_(text.folder, tmp_path / "ours")
    model = E5V.from_pretrained(ours, adapter=tmp_path / "adapter", dtype="float32")
    expected = model.encode([TEXT])
    folder = export(ours, tmp_path / "mine", adapter=tmp_path / "adapter")
    found = SentenceTransformer(str(folder), device="cpu").encode([TEXT])
    np.testing.assert_allclose(found, expected, atol=2e-5)
    card = read(folder)
    pictured(tmp_path)
    texts = run(programs(card)["e5v-jax"], tmp_path)["texts"]
    assert texts[0] @ expected[0] > 0.99
    assert "in one word:<" in card.text
    TrainedWith(prompt="<sent>\nOne word: ").write(tmp_path / "adapter")
    export(ours, tmp_path / "own", adapter=tmp_path / "adapter")
    assert r"prompt='<sent>\nOne word: ')" in programs(read(tmp_path / "own"))["e5v-jax"]
