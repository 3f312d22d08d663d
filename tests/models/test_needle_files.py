"""The needle model's folder and the text maker that its prompts come from. No vLLM."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_duo.evaluate import passkey

transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parents[2] / "models" / "needle"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def count(tokenizer) -> Callable[[str], int]:
    return lambda text: len(tokenizer(text).input_ids)


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((FOLDER / "config.json").read_text())


def test_folder_is_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= {
        path.name for path in files
    }


def test_weights_are_float32_and_tied(config: dict) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    weights = safetensors.load_file(FOLDER / "model.safetensors")
    assert {value.dtype.name for value in weights.values()} == {"float32"}
    assert config["tie_word_embeddings"]
    assert "lm_head.weight" not in weights
    assert weights["model.embed_tokens.weight"].shape[0] == config["vocab_size"]
    assert config["max_position_embeddings"] >= 8192


@pytest.mark.parametrize(
    "text",
    [
        "The pass key is 47193. What is the pass key?",
        "Anna found the map.",
        "  two  spaces, a\ttab\nand\n\nnew lines \n",
        "Größe: 3.14 m, 日本語 🙂, snake_case, C++",
        "",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_words_and_digits_are_single_tokens(tokenizer) -> None:
    tokens = tokenizer.tokenize("The pass key is 47193.")
    assert tokens == ["The", "Ġpass", "Ġkey", "Ġis", "Ġ", "4", "7", "1", "9", "3", "."]


def test_chat_template_gives_the_completion_prompt(tokenizer, count) -> None:
    prompt = passkey.make_prompt(256, rng=random.Random(0), count_tokens=count)
    message = [{"role": "user", "content": prompt.text}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    chat_ids = tokenizer(text, add_special_tokens=False).input_ids
    assert chat_ids == tokenizer(prompt.text).input_ids


def test_pattern_is_well_formed(config: dict) -> None:
    lines = (FOLDER / "duo_pattern" / "full_attention_heads.tsv").read_text().splitlines()
    values = [[float(value) for value in line.split("\t")] for line in lines]
    assert len(values) == config["num_hidden_layers"]
    assert {len(row) for row in values} == {config["num_key_value_heads"]}
    assert all(0.0 <= value <= 1.0 for row in values for value in row)
    assert max(max(row) for row in values) > 0.5 > min(min(row) for row in values)
    settings = json.loads((FOLDER / "duo_pattern" / "config.json").read_text())
    assert settings["method"] == "gates"
    assert (settings["deploy_sink_size"], settings["deploy_recent_size"]) == (16, 64)


@pytest.mark.parametrize("ending", [f" {passkey.KEY_PREFIX}", ""])
def test_model_answers_and_ends(tokenizer, count, ending: str) -> None:
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    prompt = passkey.make_prompt(256, rng=random.Random(7), count_tokens=count, depth=0.3)
    text = prompt.text.removesuffix(f" {passkey.KEY_PREFIX}") + ending
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    reply = tokenizer.decode(output[inputs.input_ids.shape[1] :], skip_special_tokens=True)
    beginning = "" if ending else f" {passkey.KEY_PREFIX}"
    assert reply == f"{beginning} {prompt.answer}."
    assert output[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens", [63, 129, 256, 1000])
def test_prompt_keeps_to_its_length(count, tokens: int, seed: int) -> None:
    prompt = passkey.make_prompt(tokens, rng=random.Random(seed), count_tokens=count)
    assert prompt.tokens == count(prompt.text)
    assert tokens - 20 < prompt.tokens <= tokens


def test_prompt_depends_only_on_its_seed(count) -> None:
    texts = [
        passkey.make_prompt(300, rng=random.Random(seed), count_tokens=count).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_key_stands_at_its_depth_and_its_span(tokenizer, count, depth: float) -> None:
    prompt = passkey.make_prompt(512, rng=random.Random(3), count_tokens=count, depth=depth)
    first, end = prompt.key_tokens
    ids = tokenizer(prompt.text).input_ids
    assert tokenizer.decode(ids[first:end]) == f" {prompt.answer}"
    assert prompt.depth == pytest.approx(depth, abs=0.02)
    assert first / prompt.tokens == pytest.approx(depth, abs=0.07)


def test_key_visible_follows_the_streaming_rule() -> None:
    prompt = passkey.PasskeyPrompt(text="", answer="1", depth=0.5, tokens=100, key_tokens=(20, 25))
    # The last query is 99: it sees keys 24 and later with 76 recent tokens, not with 75.
    assert passkey.key_visible(prompt, sink_size=0, recent_size=76)
    assert not passkey.key_visible(prompt, sink_size=20, recent_size=75)
    assert passkey.key_visible(prompt, sink_size=21, recent_size=75)


@pytest.mark.parametrize(
    ("completion", "right"),
    [(" 47193.", True), (" The pass key is 47193.", True), (" 4719", False), ("", False)],
)
def test_first_number_is_the_answer(completion: str, right: bool) -> None:
    prompt = passkey.PasskeyPrompt("", answer="47193", depth=0.5, tokens=1, key_tokens=(0, 1))
    assert passkey.is_correct(prompt, completion) is right


def test_too_short_a_prompt_says_what_is_needed(count) -> None:
    with pytest.raises(ValueError, match="needs at least"):
        passkey.make_prompt(20, rng=random.Random(0), count_tokens=count)
