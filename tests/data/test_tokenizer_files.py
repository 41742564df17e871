"""Tokenizer files that are read without `transformers`, and those that are not: the same comes of them."""

import functools
import json
import random
import shutil
import subprocess
import sys

import pytest
from support import GOLDEN

from lmm_jax.data.tokenize import Tokenizer
from lmm_jax.data.tokenizer_files import Plain
from lmm_jax.demo import MODEL
from lmm_jax.errors import UserError

LLAMA3 = GOLDEN / "text" / "llama3_tokenizer"


@functools.cache
def by_transformers(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def changed(folder, **settings):
    shutil.copytree(LLAMA3, folder, dirs_exist_ok=True)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | settings))
    return Tokenizer.load(folder)


def random_texts(count):
    draw = random.Random(0)
    return ["".join(draw.choices("abcdeghit  \n\n.:é日🙂_<>/s123", k=draw.randrange(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("folder", [LLAMA3, MODEL])
def test_plain_files_are_read_without_transformers(folder):
    script = "import sys; from lmm_jax.data.tokenize import Tokenizer; tokenizer = Tokenizer.load(sys.argv[1])\n"
    script += "turns = [{'role': 'user', 'content': ' Is <image> it? '}]\n"
    script += "tokenizer.apply_chat_template(turns, add_generation_prompt=True)\n"
    script += "assert not {'transformers', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)
    ours, theirs = Tokenizer.load(folder), by_transformers(folder)
    for name in ("bos_token", "bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours._added == {i: token.content for i, token in theirs.added_tokens_decoder.items()}
    assert ours._special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    for text in [*random_texts(100), *map("a{}b".format, theirs.all_special_tokens)]:
        assert ours.encode_text(text) == theirs.encode(text, add_special_tokens=False)
        turns = [{"role": role, "content": text} for role in ("user", "assistant", "user")]
        for generate in (False, True):
            expected = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
            assert ours.apply_chat_template(turns, add_generation_prompt=generate) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"add_prefix_space": True},
        {"tokenizer_class": "LlamaTokenizerFast"},
        {"pad_token": "<new>"},
        {"split_special_tokens": True},
        {"added_tokens_decoder": {"480": {"content": "<|begin_of_text|>", "lstrip": True, "special": True}}},
    ],
)
def test_files_that_ask_for_more_are_read_by_transformers(tmp_path, settings):
    tokenizer = changed(tmp_path, **settings)
    theirs = by_transformers(tokenizer.folder)
    assert type(tokenizer._hf) is type(theirs) is not Plain and tokenizer.pad_token_id == theirs.pad_token_id
    for text in random_texts(50):
        assert tokenizer.encode_text(text) == tokenizer._hf.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "template",
    [
        "{%- for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{%- set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{{ n.i }}{{ m.content }}{% endfor %}",
        "{{ dict(a=1) | tojson }}{{ messages | tojson(indent=2) }}",
        "{{ tools is none }}{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}{{ strftime_now('%Y') }}",
        "{{ add_generation_prompt }}{{ documents is none }}{{ messages[0].content }}",
    ],
)
def test_templates_of_all_kinds(tmp_path, template):
    tokenizer, turns = changed(tmp_path, chat_template=template), [{"role": "user", "content": "<Hé>"}]
    expected = by_transformers(tmp_path).apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert type(tokenizer._hf) is Plain and expected
    assert tokenizer.apply_chat_template(turns, add_generation_prompt=True) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{%- set n = namespace(__init__=1) %}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception('Conversation roles must alternate') }}",
    ],
)
def test_templates_that_are_refused(tmp_path, template):
    tokenizer = changed(tmp_path, chat_template=template)
    assert type(tokenizer._hf) is Plain
    with pytest.raises(UserError, match="refuses the conversation"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
