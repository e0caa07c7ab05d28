"""Chat templates: the text that transformers makes, and no more than that."""

import json
import signal
import time

import pytest
from chats import LLAMA2, TEMPLATES

from longlora_jax.config import DataConfig
from longlora_jax.data.chat import load_prompt
from longlora_jax.data.chat_template import ChatTemplate, TemplateFault, load_chat_template
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
        "{{ 'a' ~ 1 ~ none }}{{ '%s-%03d' % ('a', 7) }}{{ '%s'|format(2) }}{{ '{:>5}'.format(3) }}{{ 2 ** 10 + 3 * 4 }}"
        "{{ 'b' * 3 + 'c' }}{{ ['x', 1]|join(', ') }}{{ messages|join('+', attribute='role') }}"
        "{{ 'aaa'|replace('a', 'b', 2) }}"
        "{{ ', '.join(['y', 'z']) }}{{ 'a\\nb'|indent(2, true) }}{{ 'aa'.replace('a', 'c', 1) }}{{ 7 % 4 }}"
        "{% set t %}<{{ eos_token }}>{% endset %}{{ t }}{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) ~ f('<') }}",
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
    """Catches: a model's folder that runs programs, changes the data or writes without end."""
    with pytest.raises(TemplateFault):
        ChatTemplate(template, {}).render(MESSAGES)


@pytest.mark.parametrize(
    "step",
    [
        "(n * 'ab')|length",
        "('ab' * n)|length",
        "([1] * n)|length",
        "(n ** 2000)|string|length",
        "('%' ~ n ~ 'd') % 1",
        "'%*d' % (n, 1)",
        "('%' ~ n ~ 'd')|format(1)",
        "('{:' ~ n ~ '}').format(1)",
        "'{:{w}}'.format(1, w=n)",
        "'{a:{w}}'.format_map({'a': 1, 'w': n})",
        "('a' * 20000)|replace('a', 'b' * 20000)",
        "('a' * 20000).replace('a', 'b' * 20000)",
        "('a' * 20000).join('b' * 20000)",
        "('b' * 20000)|join('a' * 20000)",
        "'a'|indent(n, true)",
        "[1]|tojson(indent=n)",
    ],
)
def test_no_step_of_a_template_fills_the_memory(step, monkeypatch):
    """Catches: gigabytes out of one short line, before the limits of time and length are ever asked."""
    monkeypatch.setattr("longlora_jax.data.chat_template.STEP_LIMIT", 100_000)
    with pytest.raises(TemplateFault, match="makes too much at once"):
        ChatTemplate(f"{{% set n = 100001 %}}{{% if {step} %}}{{% endif %}}", {}).render(MESSAGES)


@pytest.mark.parametrize(
    "twice",
    [
        "n.x ~ n.x",
        "n.x + n.x",
        "[n.x, n.x]|join",
        "'%s%s'|format(n.x, n.x)",
        "'{0}{0}'.format(n.x)",
        "'%(x)s%(x)s' % n2",
    ],
)
def test_what_is_doubled_again_and_again_is_stopped(twice, monkeypatch):
    """Catches: the same by forty small steps."""
    monkeypatch.setattr("longlora_jax.data.chat_template.STEP_LIMIT", 100_000)
    step = f"{{% set n2 = {{'x': n.x}} %}}{{% set n.x = {twice} %}}"
    template = f"{{% set n = namespace(x='a') %}}{{% for i in range(20) %}}{step}{{% endfor %}}"
    with pytest.raises(TemplateFault, match="makes too much at once"):
        ChatTemplate(template, {}).render(MESSAGES)


@pytest.mark.parametrize(
    "padding", ["'a'.ljust(9)", "'a'.rjust(9)", "'a'.center(9)", "'a'.zfill(9)", "'a'.expandtabs(9)"]
)
def test_padding_by_any_width_is_refused(padding):
    """Catches: the same by methods that no chat template needs."""
    with pytest.raises(TemplateFault, match="unsafe"):
        ChatTemplate(f"{{{{ {padding} }}}}", {}).render(MESSAGES)


def test_training_does_not_see_the_clock(tmp_path):
    """Catches: a run that is refused its own data on the day after, because a template says what day it is."""
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}")
    assert load_prompt(DataConfig(), str(tmp_path)).render([]) == "26 Jul 2024"
    assert load_chat_template(str(tmp_path)).render([]) in {time.strftime("%d %b %Y"), time.strftime("%d %b %Y")}


def test_a_template_without_end_is_stopped(monkeypatch):
    """Catches: a training that never begins, and an alarm that goes on ticking after the template."""
    monkeypatch.setattr("longlora_jax.data.chat_template.RENDER_SECONDS", 0.2)
    # Jinja's int takes any ValueError in it for a text that is no number.
    swallow = "{% set s = '9' * 4000 %}{% for i in range(99999) %}{% if s|int %}{% endif %}{% endfor %}"
    for endless in ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", swallow):
        with pytest.raises(TemplateFault, match="more than 0.2 seconds"):
            ChatTemplate(endless, {}).render(MESSAGES)
    assert ChatTemplate("as ever", {}).render(MESSAGES) == "as ever"
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_where_a_template_is_found(tmp_path):
    """Catches: the file beside the config that newer models have, or the default among several, passed over."""
    config = {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(str(tmp_path)).render([]) == "d"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "d{{ bos_token }}", "bos_token": null}')
    assert load_chat_template(str(tmp_path)).render([]) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_chat_template(str(tmp_path)).render([]) == "file"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match="not one that Jinja reads"):
        load_chat_template(str(tmp_path))
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="has no chat template: set data.prompt=alpaca"):
        load_prompt(DataConfig(), str(tmp_path))


def test_a_template_that_refuses_is_a_bad_row(tmp_path):
    """Catches: a template's own exception as a traceback."""
    template = ChatTemplate(LLAMA2, {"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(TemplateFault, match="roles must alternate"):
        template.render([{"role": "assistant", "content": "a"}])
    with pytest.raises(TemplateFault, match="no element 7"):
        ChatTemplate("{{ messages[7].content.strip() }}", {}).render([])
