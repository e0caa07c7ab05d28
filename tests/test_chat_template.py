"""Chat templates: the text that transformers makes, and no more than that."""

import json
import signal

import pytest
from chats import LLAMA2, TEMPLATES

from longlora_jax.data.chat_template import ChatTemplate, TemplateFault, load_chat_template
from longlora_jax.data.sft import load_prompt
from longlora_jax.errors import UserError

MESSAGES = [{"role": "user", "content": "é <b> 'q'\n"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "template",
    [
        *TEMPLATES.values(),
        "{% for m in messages %}\n  {%- if loop.first %}x{% endif %}\n    {% if true %}\n{{ m | tojson }}\n{% endif %}"
        "{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ '' if tools else 'none' }}{{ strftime_now('%Y') }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% if ns.n > 1 %}{% break %}{% endif %}{% endfor %}{{ ns.n }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ eos_token }}",
    ],
)
def test_rendering_equals_transformers(template):
    """Catches: other rules for blanks in templates, HTML escapes in JSON, a tag or a function that is missing."""
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = ChatTemplate(template, special)
    for prompt in (False, True):
        [text], _ = render([MESSAGES], chat_template=template, add_generation_prompt=prompt, **special)
        assert ours.render(MESSAGES, add_generation_prompt=prompt) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    ],
)
def test_templates_are_in_a_sandbox(template):
    """Catches: a model's folder that runs programs, changes the data or fills the memory."""
    with pytest.raises(TemplateFault):
        ChatTemplate(template, {}).render(MESSAGES)


def test_a_template_without_end_is_stopped(monkeypatch):
    """Catches: a training that never begins, and an alarm that goes on ticking after the template."""
    monkeypatch.setattr("longlora_jax.data.chat_template.RENDER_SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateFault, match="more than 0.2 seconds"):
        ChatTemplate(endless, {}).render(MESSAGES)
    assert ChatTemplate("as ever", {}).render(MESSAGES) == "as ever"
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_where_a_template_is_found(tmp_path):
    """Catches: the file beside the config that newer models have, or the default among several, passed over."""
    config = {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(str(tmp_path)).render([]) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_chat_template(str(tmp_path)).render([]) == "file"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match="not one that Jinja reads"):
        load_chat_template(str(tmp_path))
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="has no chat template: set data.prompt=alpaca"):
        load_prompt("chat", str(tmp_path))


def test_a_template_that_refuses_is_a_bad_row(tmp_path):
    """Catches: a template's own exception as a traceback."""
    template = ChatTemplate(LLAMA2, {"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(TemplateFault, match="roles must alternate"):
        template.render([{"role": "assistant", "content": "a"}])
    with pytest.raises(TemplateFault, match="no element 7"):
        ChatTemplate("{{ messages[7].content.strip() }}", {}).render([])
