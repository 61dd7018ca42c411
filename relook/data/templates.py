"""Conversation templates: the text around prompts and answers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relook.data.samples import Turn
from relook.errors import RecipeError, did_you_mean

IMAGE = "<image>"
IM_START, IM_END, IM_PATCH = "<im_start>", "<im_end>", "<im_patch>"
EOS = "</s>"
MARKS = ("image_token", "boi_token")  # attributes of processors: what stands for an image in a text
CHAT = "chat"  # the template that a model's processor brings along


@dataclass(frozen=True)
class TemplatePiece:
    """Piece of a rendered conversation.

    Args:
        supervised: True for a response and its end mark.
        context: True for the unsupervised beginning of a response.
    """

    text: str
    supervised: bool = False
    context: bool = False


@dataclass(frozen=True)
class Template:
    """Text format of a conversation: `first` prompt `cue` `lead` response `end` `later` prompt `cue` ...

    The templates follow LLaVA v1.2.2's conversation.py and llava-hf's chat template. v1 is checked against prompts
    that the original wrote; for the others there is no reference output.

    Args:
        first: text before the first prompt: system text, examples, the user's name.
        later: text before every other prompt.
        cue: text after a prompt; here the model begins to write.
        lead: text that the model writes first.
        end: text that the model writes last.
        captions: training keeps only the images of a prompt and leaves out `cue` (LLaVA's projector pretraining).
        image: how an image is written in a prompt.
        before_text: text before a prompt that does not begin with an image.
        after_images: text between the images that a prompt begins with and its text.
        bos: BOS precedes the conversation, if the tokenizer has one; a model's own template says for itself.
    """

    name: str
    first: str
    later: str
    cue: str
    lead: str
    end: str
    captions: bool = False
    image: str = IMAGE
    bos: bool = True
    before_text: str = ""
    after_images: str = ""

    @property
    def stop(self) -> str:
        """Return the text that ends an answer, if that is not the end-of-text token: generation must look for it."""
        return self.end.replace(EOS, "").strip()

    def render(self, turns: Sequence[Turn], open_end: bool = False) -> list[TemplatePiece]:
        """Render a conversation as pieces. With `open_end`, the last response is left for the model to write."""
        pieces = []
        for i, turn in enumerate(turns):
            if self.captions and not open_end:
                # LLaVA's `preprocess_plain`: images, caption, end mark, and no word of the prompt.
                pieces += [TemplatePiece(IMAGE * turn.prompt.count(IMAGE)), *self._response(turn, "")]
                continue
            # The cue belongs to the prompt; the lead is written by the model and therefore supervised.
            pieces.append(TemplatePiece(f"{self.later if i else self.first}{self._prompt(turn.prompt)}{self.cue}"))
            if not (open_end and i == len(turns) - 1):
                pieces += self._response(turn, self.lead)
        return pieces

    def _prompt(self, prompt: str) -> str:
        text = prompt
        while text.startswith(self.image):
            text = text.removeprefix(self.image)
        images = prompt.removesuffix(text)
        return f"{images}{self.after_images if images else self.before_text}{text}"

    def _response(self, turn: Turn, lead: str) -> list[TemplatePiece]:
        """Render a turn's response: its context, if it has one, then what the model learns to write."""
        ending = self.end if turn.complete else ""
        if not turn.context:
            return [TemplatePiece(f"{lead}{turn.response}{ending}", True)]
        remainder = turn.response.removeprefix(turn.context)
        return [TemplatePiece(lead + turn.context, context=True), TemplatePiece(remainder + ending, True)]


_VICUNA = (
    "A chat between a curious {user} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {user}'s questions."
)
# The single example that Vicuna v0 sees before the conversation.
_V0_EXAMPLE = (
    "Human: What are the key differences between renewable and non-renewable energy sources?###"
    "Assistant: Renewable energy sources are those that can be replenished naturally in a relatively short amount of "
    "time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are "
    "finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between "
    "renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n###"
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."


def _single(name: str, start: str) -> Template:
    """Build a template in Vicuna v0's layout.

    LLaVA's own v0 trainer writes "### Human: ..." lines instead; here training and inference write the same text.
    """
    return Template(name, f"{start}Human: ", "Human: ", "###Assistant:", " ", "###")


def _two(name: str, system: str) -> Template:
    return Template(name, f"{system}USER: ", "USER: ", " ASSISTANT:", " ", EOS)


def _llama(name: str, system: str, bos: str) -> Template:
    # The system text lies inside the first prompt; in LLaMA-2's format every later exchange begins with BOS again.
    start = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return Template(name, f"[INST] {start}", f"{bos}[INST] ", " [/INST]", " ", f" {EOS}")


def _chatml(name: str, system: str) -> Template:
    # LLaVA writes no newline after <|im_end|>, unlike ChatML itself.
    user = "<|im_start|>user\n"
    start = f"<|im_start|>system\n{system}<|im_end|>{user}"
    return Template(name, start, user, "<|im_end|><|im_start|>assistant\n", "", "<|im_end|>")


_KNOWN = (
    _single("v0", f"{_VICUNA.format(user='human')}###{_V0_EXAMPLE}"),
    _single("llava_v0", f"{_VICUNA.format(user='human')}###"),
    _two("v1", f"{_VICUNA.format(user='user')} "),
    # HA-DPO's POPE script evaluates with this template.
    _two("llava_v1", f"{_VICUNA.format(user='human')} "),
    _two("llava_hf", ""),
    _llama("llama_2", _LLAMA_2, "<s>"),
    _llama("llava_llama_2", _LLAVA_LLAMA_2, "<s>"),
    _llama("mistral", "", ""),
    _chatml("mpt", _MPT),
    _chatml("chatml", "Answer the questions."),
    Template("plain", "", "", "\n", "", "\n", captions=True),
)
# The original's other names for the same templates.
_ALIASES = {
    "vicuna_v1": "v1",
    "mistral_instruct": "mistral",
    "chatml_direct": "chatml",
    "mistral_direct": "chatml",
    "v0_plain": "plain",
}
TEMPLATES = {template.name: template for template in _KNOWN}
TEMPLATES |= {alias: TEMPLATES[name] for alias, name in _ALIASES.items()}


def get_template(name: str, processor: Any = None) -> Template:
    """Return the template of that name.

    Args:
        processor: a model's processor, whose own chat template is called CHAT.

    Raises:
        RecipeError: there is no such template; the message lists the known names.
    """
    if name == CHAT and processor is not None:
        return processor_template(processor)
    try:
        return TEMPLATES[name]
    except KeyError:
        raise RecipeError(f"There is no conversation template {name!r}.", did_you_mean(name, TEMPLATES)) from None


def check_template(name: str) -> None:
    """Check that there is such a template, before a model is loaded. Raises RecipeError as `get_template` does."""
    if name != CHAT:
        get_template(name)


def processor_template(processor: Any) -> Template:
    """Take a processor's own chat template apart, by rendering a conversation of known texts.

    Raises:
        RecipeError: it has none, or writes the answers of earlier turns in another way than the one to be written.
    """
    texts = [f"relook's {word} text" for word in ("first", "second", "third")]
    prompt, response, last = ({"type": "text", "text": text} for text in texts)

    def render(*turns: list[dict[str, str]], is_open: bool = True) -> str:
        messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
        return str(processor.apply_chat_template(messages, add_generation_prompt=is_open, tokenize=False))

    try:
        first, cue, between, open_cue = re.split("|".join(texts), render([prompt], [response], [last]))
        closed = render([prompt], [response], is_open=False).partition(texts[1])[2]
        single, double = (render([*[{"type": "image"}] * n, prompt]).partition(texts[0])[0] for n in (1, 2))
    except Exception as error:  # jinja raises anything; without a template, ValueError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecipeError(f"The model's own chat template cannot be used: {reason}", OTHER) from None
    # The prompt begins with an image, or with text: what follows their common beginning differs.
    start = "".join(
        a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(single, first, strict=False))
    )
    image = single[len(start) : len(start) + len(double) - len(single)]
    token = image_mark(processor)
    before_text, after_images = first.removeprefix(start), single.removeprefix(start + image)
    end = closed.rstrip("\n")  # what follows the end mark belongs to the next turn
    if not closed:  # an answer ends with the mark that begins the next turn, as in GLM-4V
        specials = processor.tokenizer.added_tokens_decoder.values()
        end = max((t.content for t in specials if t.special and between.startswith(t.content)), key=len, default="")
    later = between.removeprefix(end)
    # LLaVA-OneVision's makers have another space in earlier turns: the one to be written is what it was trained on.
    cue = open_cue if cue.split() == open_cue.split() and not cue.startswith(open_cue) else cue
    knows_parts = cue.startswith(open_cue) and between.startswith(closed) and later.endswith(before_text)
    if not (knows_parts and end and image.count(token) == 1 and double == start + 2 * image + after_images):
        raise RecipeError("The model's own chat template writes answers or images in a way that relook cannot.", OTHER)
    return Template(
        CHAT,
        start,
        later.removesuffix(before_text),
        open_cue,
        cue.removeprefix(open_cue),
        end,
        image=image.replace(token, IMAGE),
        bos=False,
        before_text=before_text,
        after_images=after_images,
    )


def image_mark(processor: Any) -> str:
    """Return the token that a processor replaces by an image's placeholders, which may be others (Gemma 3)."""
    text = str(getattr(processor, "chat_template", None) or "")
    parts = (processor, processor.tokenizer)
    tokens = [token for name in MARKS for part in parts if (token := getattr(part, name, None))]
    return str(next((token for token in tokens if token in text), (*tokens, IMAGE)[0]))


OTHER = f"Name a template by version: {', '.join(TEMPLATES)}."


def with_image(prompt: str, images: int = 1) -> str:
    """Put image placeholders before a bare prompt, as LLaVA does; a prompt that has one is unchanged."""
    return prompt if IMAGE in prompt else f"{IMAGE}\n" * images + prompt


def interleave(parts: Sequence[str], separator: str = "") -> str:
    """Join the texts and placeholders of a message.

    Images that have a text between them stay where they are. Otherwise the placeholders are left out: the images then
    stand before the text (`with_image`), as LLaVA was trained.
    """
    places = [i for i, part in enumerate(parts) if part == IMAGE]
    between = parts[places[0] : places[-1]] if places else ()
    shown = parts if any(part != IMAGE and part.strip() for part in between) else [p for p in parts if p != IMAGE]
    return separator.join(shown)


def image_first(prompt: str) -> str:
    """Move a prompt's only image placeholder to its front, as LLaVA does before training (`preprocess_multimodal`)."""
    if prompt.count(IMAGE) != 1:
        return prompt
    return f"{IMAGE}\n{prompt.replace(IMAGE, '').strip()}".strip()
