"""How an export is used, as a model card shows it: its prompts, and programs for five libraries."""

import textwrap
from dataclasses import dataclass

from e5v_jax.checkpoints.peft import target_modules
from e5v_jax.families.base import Processor
from e5v_jax.nn.parameters import ParameterTable
from e5v_jax.presets import E5_V
from e5v_jax.prompts import PROMPTS

_TEXT, _CHANGE = "a dog asleep on a sofa", "now awake"
_SLOT = "{text}"  # where the text goes in a prompt that is shown


@dataclass(frozen=True)
class Usage:
    """What the programs depend on."""

    name: str
    """Of the folder, and of its repository on the hub."""
    table: ParameterTable
    images: bool
    alone: bool
    """Whether the folder is an adapter without a model."""
    processor: Processor | None
    """What fills the prompts; None: they could not be told."""
    problem: str | None = None
    """Why other libraries would embed otherwise, or not at all; None: they give our vectors."""
    prompt: str | None = None
    """For texts, where training set one that the preset does not have."""
    template: str | None = None
    """The chat template's name, where an adapter was trained with a given one."""

    def strings(self) -> dict[str, str]:
        """The filled prompt of each kind of input, with ``{text}`` where the text goes."""
        if self.processor is None:
            return {}
        prompts = self.processor.preset.choose()
        fill = self.processor.fill
        found = {"text": fill(prompts, _SLOT, has_image=False)}
        if self.images:
            found["image"] = fill(prompts, None, has_image=True)
            if not prompts.adds:
                found["text_image"] = fill(prompts, _SLOT, has_image=True)
        return found

    def prompts(self) -> str:
        """The section of prompts."""
        if self.processor is None:
            return f"They could not be told from the model folder: {self.problem}"
        preset = self.processor.preset
        mean = preset.pooling == "mean"
        pooled = "the mean of its tokens" if mean else "the last token"
        text = (
            "A prompt goes around every input, special tokens and all, then what the tokenizer "
            f"itself puts at its ends. The vector is the last hidden state of {pooled}, made unit "
            f"length.\n\n{self._literal()}\n"
        )
        if self.images and preset.choose().adds:
            text += "\nA text with an image is embedded as two, whose vectors are added.\n"
        if self.problem is None and not self.alone:
            text += "\n`chat_template.jinja` renders the same."
        return text + (
            "\nThe name of a special token in a user's text (such as `</s>`) is read as its "
            "characters by e5v-jax alone."
        )

    def _literal(self) -> str:
        lines = [f"    {kind!r}: {string!a}," for kind, string in self.strings().items()]
        return "\n".join(["```python", "PROMPTS = {", *lines, "}", "```"])

    def text(self, base: str) -> str:
        """The section of programs; ``base`` is what they call the model that an adapter is for."""
        parts = [("e5v-jax", self._e5v_jax(base))]
        if self.problem is None:
            parts += self._of_adapter(base) if self.alone else self._of_model()
        blocks = [f"**{name}**\n\n{_block(code)}" for name, code in parts]
        if self.problem is not None:
            blocks.append(f"Other libraries would give other vectors, or none: {self.problem}.")
            return "\n\n".join(blocks)
        if self.alone:
            blocks.insert(3, self._merging(base))
        blocks.append(
            "e5v-jax's tests run these programs, but for vLLM's, which follows its documentation."
        )
        return "\n\n".join(blocks)

    def _items(self) -> str:
        """What the programs embed, one of each kind."""
        if not self.images:
            return f'["{_TEXT}", "a puppy naps on a couch"]'
        both = (
            f', {{"image": image, "text": "{_CHANGE}"}}' if "text_image" in self.strings() else ""
        )
        return f'["{_TEXT}", image{both}]'

    def _e5v_jax(self, base: str) -> str:
        options = ""
        if self.alone:
            loaded = f'"{base}", adapter="{self.name}"'
        else:
            loaded = f'"{self.name}"'
            if self.processor is not None and self.processor.preset.name != E5_V.name:
                options += f', preset="{self.processor.preset.name}"'
            if self.template is not None:
                options += f', template="{self.template}"'
        lines = ["from e5v_jax import E5V", "", f"model = E5V.from_pretrained({loaded}{options})"]
        if self.prompt is not None and not self.alone:
            option = "prompt_name" if self.prompt in PROMPTS else "prompt"
            lines.append(f'texts = model.encode(["{_TEXT}"], {option}={self.prompt!a})')
            if not self.images:
                return "\n".join(lines)
            return "\n".join(
                ["from PIL import Image", *lines, 'images = model.encode([Image.open("dog.jpg")])']
            )
        if self.images:
            lines = ["from PIL import Image", *lines, 'image = Image.open("dog.jpg")']
        return "\n".join([*lines, f"vectors = model.encode({self._items()})"])

    def _of_model(self) -> list[tuple[str, str]]:
        name, image = self.name, 'image = Image.open("dog.jpg")\n' if self.images else ""
        pillow = "from PIL import Image\n" if self.images else ""
        loader, auto = self._loader(), self._auto()
        content = (
            f'[{{"type": "image", "image": image}}, {{"type": "text", "text": "{_CHANGE}"}}]'
            if "text_image" in self.strings()
            else '[{"type": "image", "image": image}]'
            if self.images
            else f'"{_TEXT}"'
        )
        return [
            (
                "sentence-transformers 6",
                f"""{pillow}from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
{image}vectors = [model.encode(item) for item in {self._items()}]""",
            ),
            (
                "transformers 5",
                f"""import torch
{pillow}from transformers import AutoModel, {loader}

model = AutoModel.from_pretrained("{name}").eval()
processor = {loader}.from_pretrained("{name}")
{image}message = {{"role": "user", "content": {content}}}
inputs = processor.apply_chat_template(
    [message], tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    states = model(**inputs).last_hidden_state
vector = torch.nn.functional.normalize({self._pooled("states")}, dim=-1)""",
            ),
            (
                "PEFT, to train on from here",
                f"""from peft import LoraConfig, get_peft_model
from transformers import {auto}

model = {auto}.from_pretrained("{name}")
targets = {target_modules(self.table)!r}
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))""",
            ),
            ("vLLM", self._vllm(name)),
        ]

    def _of_adapter(self, base: str) -> list[tuple[str, str]]:
        auto, loader = self._auto(), self._loader()
        kind = "text_image" if "text_image" in self.strings() else "text"
        text = _CHANGE if kind == "text_image" else _TEXT
        string = f'PROMPTS["{kind}"].replace("{_SLOT}", "{text}")'
        pillow, made = "", f'inputs = processor({string}, return_tensors="pt")'
        if kind == "text_image":
            pillow, made = (
                "from PIL import Image\n",
                (
                    'image = Image.open("dog.jpg")\n'
                    f"inputs = processor(\n    text={string},\n"
                    '    images=image,\n    return_tensors="pt",\n)'
                ),
            )
        states = self._pooled("states")
        ends = f"""{made}
with torch.no_grad():
    states = model(**inputs, output_hidden_states=True).hidden_states[-1]
vector = torch.nn.functional.normalize({states}, dim=-1)"""
        start = f"import torch\n{pillow}"
        return [
            (
                "PEFT",
                f"""{start}from peft import PeftModel
from transformers import {auto}, {loader}

model = {auto}.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "{self.name}").eval()
processor = {loader}.from_pretrained("{base}")
{ends}""",
            ),
            (
                "transformers 5",
                f"""{start}from transformers import {auto}, {loader}

model = {auto}.from_pretrained("{base}").eval()
model.load_adapter("{self.name}")
processor = {loader}.from_pretrained("{base}")
{ends}""",
            ),
            (
                "sentence-transformers 6",
                f"""from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{self.name}-merged")
vectors = model.encode(["{_TEXT}", "a puppy naps on a couch"])""",
            ),
            ("vLLM", self._vllm(f"{self.name}-merged")),
        ]

    def _merging(self, base: str) -> str:
        merged = f"{self.name}-merged"
        return (
            "The next two read whole models. Merge the adapter into one first:\n\n```\n"
            f"e5v-convert {base} {self.name}-base\n"
            f"e5v-export {self.name}-base {merged} --adapter {self.name}\n```"
        )

    def _vllm(self, name: str) -> str:
        lines = f"""from vllm import LLM

model = LLM("{name}", runner="pooling")
(output,) = model.embed([PROMPTS["text"].replace("{_SLOT}", "{_TEXT}")])
vector = output.outputs.embedding"""
        if not self.images:
            return lines
        return f"""from PIL import Image
{lines}
(output,) = model.embed(
    [{{"prompt": PROMPTS["image"], "multi_modal_data": {{"image": Image.open("dog.jpg")}}}}]
)"""

    def _pooled(self, states: str) -> str:
        """Of ``states`` [1, T, D], without padding as there is one input."""
        mean = self.processor is not None and self.processor.preset.pooling == "mean"
        return f"{states}.mean(1)" if mean else f"{states}[:, -1]"

    def _loader(self) -> str:
        return "AutoProcessor" if self.images else "AutoTokenizer"

    def _auto(self) -> str:
        return "AutoModelForImageTextToText" if self.images else "AutoModelForCausalLM"


def _block(code: str) -> str:
    return f"```python\n{textwrap.dedent(code).strip()}\n```"
