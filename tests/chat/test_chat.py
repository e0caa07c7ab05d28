"""The chat page: a document that is read once, answers that are the model's own, text that stays text."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chats import SPECIAL, TEMPLATES, build
from tiny import random_params, tiny_config

from longlora_jax.chat import __main__ as command
from longlora_jax.chat import conversation as module
from longlora_jax.chat.conversation import Conversation, Reader
from longlora_jax.chat.document import Document, read_document
from longlora_jax.data import load_tokenizer
from longlora_jax.data.chat import render_chat
from longlora_jax.errors import UserError
from longlora_jax.generate import generate
from longlora_jax.generate.generation import prompt_ids
from longlora_jax.generate.session import Sampling
from longlora_jax.model.decoder import Llama
from longlora_jax.weights.hf import save_hf
from longlora_jax.weights.load import open_model

ROOT = Path(__file__).parents[2]
BOOK = Document("book.txt", "Who wrote it? Jane Austen did, in 1811. You are welcome. " * 4)
NEW = 12
EVIL = "<img src=x onerror=alert(1)>"


def make_model(folder: Path, window: int) -> str:
    backend = build("smollm2")
    model = Llama(tiny_config(vocab_size=backend.get_vocab_size(), max_position_embeddings=window))
    save_hf(str(folder), model.config, random_params(model, seed=3))
    backend.save(str(folder / "tokenizer.json"))
    bos, eos, _ = SPECIAL["smollm2"]
    config = {"bos_token": bos, "eos_token": eos, "chat_template": TEMPLATES["smollm2"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("chat") / "model", 512)


@pytest.fixture(scope="module")
def reader(folder) -> Reader:
    return Reader(open_model(folder), load_tokenizer(folder), chunk=32)


def asked(talk: Conversation, question: str, new: int = NEW, **options):
    talk.ask(question)
    *_, turn = talk.answer(new, **options)
    return turn


def alone(reader: Reader, ids, new: int = NEW) -> str:
    """The answer of the model to a whole prompt, with nothing before it."""
    (tokens,) = generate(reader._model, reader._params, [ids], max_new_tokens=new, chunk=32)
    return reader.tokenizer.decode(tokens, skip_special_tokens=True)


def chat_ids(reader: Reader, folder: str, *said: str):
    roles = ["user", "assistant"] * len(said)
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    text = render_chat(folder, messages, add_generation_prompt=True)
    return reader.tokenizer.encode_batch([text], add_bos=False)[0]


# What the model says, and what it reads for it


def test_answers_are_those_of_the_whole_prompt_and_the_document_is_read_once(reader, folder):
    """Catches: a question that sees the one before it, an answer that is not part of the next prompt, a document that
    is read anew for each question."""
    talk = Conversation(reader)
    talk.load(BOOK)
    read = list(talk.read_ahead())
    assert read[0] == (32, talk.document_tokens) and read[-1] == (talk.document_tokens,) * 2
    first = asked(talk, "Who wrote it?")
    ids = prompt_ids(BOOK.text, "Who wrote it?", reader.tokenizer, reader.chat)
    assert first.answer == alone(reader, ids) and first.ended == "length"
    assert (first.prompt_tokens, first.known_tokens) == (len(ids), talk.document_tokens)
    assert first.read_tokens == len(ids) - talk.document_tokens < 30
    second = asked(talk, "When?")
    ids = chat_ids(reader, folder, f"{BOOK.text}\n\nWho wrote it?", first.answer, "When?")
    assert second.answer == alone(reader, ids) != first.answer
    assert second.prompt_tokens == len(ids) and second.known_tokens >= talk.document_tokens
    assert talk.tokens == len(ids) + NEW
    talk.clear()
    assert talk.tokens == talk.document_tokens and talk.document == BOOK
    again = asked(talk, "Who wrote it?")
    assert again.answer == first.answer and again.known_tokens == talk.document_tokens


def test_two_pages_share_the_model_and_nothing_else(reader, folder):
    """Catches: an answer about the document of another page, which reads over the same cache."""
    other = Document("other.txt", "Thank you! You are welcome. x](y). " * 5)
    talks = [Conversation(reader), Conversation(reader)]
    for talk, document in zip(talks, (BOOK, other), strict=True):
        talk.load(document)
    for question in ("Who?", "You?"):
        for talk in talks:
            answer = asked(talk, question).answer
            said = [text for turn in talk.turns[:-1] for text in (turn.question, turn.answer)] + [question]
            said[0] = f"{talk.document.text}\n\n{said[0]}"
            assert answer == alone(reader, chat_ids(reader, folder, *said))


def test_a_document_may_follow_talk_about_nothing(reader, folder):
    """Catches: the template's own first words, which are read already, taken for the whole of what is kept."""
    talk = Conversation(reader)
    assert asked(talk, "Who?").answer == alone(reader, chat_ids(reader, folder, "Who?"))
    talk.load(BOOK)
    first = asked(talk, "Who?")
    assert first.known_tokens < 80 and first.answer == alone(reader, chat_ids(reader, folder, f"{BOOK.text}\n\nWho?"))
    talk.clear()
    assert asked(talk, "When?").known_tokens == talk.document_tokens


def test_stop(reader, folder):
    """Catches: a stop that comes late, or takes text away; a cache that the next question finds in disorder."""
    talk = Conversation(reader)
    talk.load(BOOK)
    free = alone(reader, prompt_ids(BOOK.text, "Who?", reader.tokenizer, reader.chat))
    talk.ask("Who?")
    for turn in talk.answer(NEW):
        if turn.new_tokens == 6:
            talk.stop()
    assert turn.ended == "stopped" and turn.new_tokens == 6 and turn.answer and free.startswith(turn.answer[:-1])
    ids = chat_ids(reader, folder, f"{BOOK.text}\n\nWho?", turn.answer, "When?")
    assert asked(talk, "When?").answer == alone(reader, ids)


def test_stop_while_it_reads(reader, folder, monkeypatch):
    """Catches: a book that must be read to its end before anything stops; half of it taken for all of it."""
    monkeypatch.setattr(module.Session, "wait", lambda self: time.sleep(0.1))  # so that a stop comes in time
    talk = Conversation(reader)
    talk.load(Document("new.txt", BOOK.text[::-1]))
    read = []
    for now in talk.read_ahead():
        read.append(now)
        talk.stop()
    assert len(read) <= 3 and read[-1][0] < talk.document_tokens
    talk.ask("Who?")
    for _ in talk.answer(NEW):
        talk.stop()
    turn = talk.turns[-1]
    assert turn.ended == "stopped" and turn.answer == "" and turn.new_tokens == 0
    talk.load(talk.document)
    list(talk.read_ahead())
    talk.ask(BOOK.text)
    for _ in talk.answer(NEW):
        talk.stop()
    assert talk.turns[-1].ended == "stopped" and talk.turns[-1].known_tokens == talk.document_tokens
    answer = asked(talk, "When?").answer  # and the questions without an answer are forgotten
    assert answer == alone(reader, prompt_ids(talk.document.text, "When?", reader.tokenizer, reader.chat))


def test_a_conversation_outgrows_its_cache(folder, monkeypatch):
    """Catches: a refusal long before the window is full; memory for the whole window at the first question."""
    monkeypatch.setattr(module, "STEP", 16)
    reader = Reader(open_model(folder), load_tokenizer(folder), chunk=32)
    talk = Conversation(reader)
    talk.load(BOOK)
    sizes, said = [], [f"{BOOK.text}\n\nWho?"]
    for question in ("Who?", "When?", "You?"):
        said[-1] = said[-1] if len(said) == 1 else question
        answer = asked(talk, question).answer
        assert answer == alone(reader, chat_ids(reader, folder, *said))
        sizes.append(reader._capacity)
        said += [answer, ""]
    assert talk.document_tokens < sizes[0] < sizes[-1] <= 512


def test_without_a_template(tmp_path, folder):
    """Catches: a model without a chat template refused, or another prompt than that of generate."""
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "tokenizer_config.json").write_text("{}")
    reader = Reader(open_model(str(plain)), load_tokenizer(str(plain)), chunk=32)
    talk = Conversation(reader)
    talk.load(BOOK)
    first = asked(talk, "Who?").answer
    assert first == alone(reader, prompt_ids(BOOK.text, "Who?", reader.tokenizer, reader.chat))
    second = asked(talk, "When?")
    ids = reader.tokenizer.encode(f"{BOOK.text}\n\nWho?\n{first}\n\nWhen?\n")
    assert second.answer == alone(reader, ids) and second.known_tokens >= talk.document_tokens


def test_the_model_ends_its_answer(tmp_path, folder):
    """Catches: an answer that goes on after its end, or shows the token that ends it."""
    opened = open_model(folder)
    talk = Conversation(Reader(opened, load_tokenizer(folder)))
    asked(talk, "Who?")
    drawn = talk.reader._read[-NEW:]
    ending = next(token for i, token in enumerate(drawn) if i > 3 and token not in drawn[:i])
    other = shutil.copytree(folder, tmp_path / "model")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [ending]}))
    turn = asked(Conversation(Reader(open_model(str(other)), load_tokenizer(str(other)))), "Who?")
    assert turn.ended == "eos" and turn.new_tokens == drawn.index(ending) + 1
    assert turn.answer == talk.reader.tokenizer.decode(drawn[: drawn.index(ending)], skip_special_tokens=True)


def test_sampling_reaches_the_draw(reader):
    """Catches: sliders that move nothing, the same random numbers for every answer."""
    answers = set()
    for seed in (1, 2, 1):
        talk = Conversation(reader)
        answers.add(asked(talk, "Who?", sampling=Sampling(1.5), seed=seed).answer)
    assert len(answers) == 2


# What does not fit


def test_a_document_too_long_is_told_with_the_numbers(reader):
    """Catches: nonsense from beyond the window, numbers that are not those of the bar, the old document kept."""
    talk = Conversation(reader)
    talk.load(BOOK)
    long = Document("long.txt", BOOK.text * 6)
    with pytest.raises(UserError) as error:
        talk.load(long)
    tokens = talk._shared_tokens(long)
    own = talk._shared_tokens(None)
    share = 98 * (512 - 64 - own) // (tokens - own)
    assert f"long.txt takes {tokens:,} tokens" in str(error.value) and "window is 512" in str(error.value)
    assert f"cut the document to about {share}%" in str(error.value) and "\n" not in str(error.value)
    assert talk.document is None and talk.tokens == 0
    talk.load(Document("short.txt", long.text[: len(long.text) * share // 100]))


def test_the_end_of_the_window(reader):
    """Catches: tokens beyond the window; a question lost that was refused; a page that cannot go on after it."""
    talk = Conversation(reader)
    talk.load(BOOK)
    turn = asked(talk, "Who?", 4000)
    assert turn.ended == "window" and talk.tokens == 512
    talk.ask("And then?")
    with pytest.raises(UserError, match=r"is [56]\d\d tokens, but the model's window is 512: ask less, begin a new"):
        list(talk.answer())
    assert talk.turns == [turn]
    talk.clear()
    assert asked(talk, "Who?").known_tokens == talk.document_tokens
    with pytest.raises(UserError, match="the question is empty"):
        talk.ask("  \n")


# Files


def pdf(text: str) -> bytes:
    """A PDF of one page, by hand."""
    stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]
    made, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(made))
        made += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(made)
    return made + b"xref\n0 5\n0000000000 65535 f \n" + table + end


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_document(str(path))
    assert "\n" not in str(error.value) and path.name in str(error.value) and str(path) not in str(error.value)
    return str(error.value)


def test_files_without_text(tmp_path):
    """Catches: bytes shown to a model as if they were words, a traceback in the page, a temporary folder's name."""
    assert "is empty" in refused(tmp_path / "a.txt", b" \n\n")
    assert "is empty" in refused(tmp_path / "b.md", b"")
    assert "is a binary file" in refused(tmp_path / "c.txt", b"\x89PNG\0\0\1")
    assert "is not UTF-8 text (byte 0xe9 at offset 3)" in refused(tmp_path / "d.txt", "café".encode("latin-1"))
    (tmp_path / "e.md").write_bytes("\ufeffcafé\r\n".encode())
    assert read_document(str(tmp_path / "e.md")) == Document("e.md", "café\r\n")


def test_a_pdf_without_pypdf(tmp_path, monkeypatch):
    """Catches: a traceback in the page where the package is not there."""
    monkeypatch.setitem(sys.modules, "pypdf", None)
    assert "pip install pypdf" in refused(tmp_path / "a.pdf", pdf("Hello"))


def test_pdfs(tmp_path):
    """Catches: a scan that is taken for an empty text, a locked or broken file that is told as a traceback."""
    pypdf = pytest.importorskip("pypdf")
    (tmp_path / "a.pdf").write_bytes(pdf("The keeper rowed out alone."))
    assert read_document(str(tmp_path / "a.pdf")) == Document("a.pdf", "The keeper rowed out alone.")

    def written(name: str, *, text: bool = False, password: str = "") -> bytes:
        writer = pypdf.PdfWriter()
        if text:
            writer.append(str(tmp_path / "a.pdf"))
        writer.add_blank_page(100, 100)
        if password:
            writer.encrypt(password, algorithm="RC4-128")
        writer.write(tmp_path / name)
        return (tmp_path / name).read_bytes()

    assert "has no text on its 1 pages, as a scan has none" in refused(tmp_path / "s.pdf", written("s.pdf"))
    assert "is locked by a password" in refused(tmp_path / "l.pdf", written("l.pdf", password="secret"))
    assert "cannot be read as a PDF" in refused(tmp_path / "d.pdf", b"%PDF-1.4\nnothing")
    written("half.pdf", text=True)
    assert read_document(str(tmp_path / "half.pdf")).note.startswith("1 of 2 pages have no text")


# The command


def test_wrong_uses_get_one_line(tmp_path, folder, monkeypatch):
    """Catches: a traceback; a model that is loaded, or gradio, before a fault of the call is told."""

    def fault(*flags: str) -> str:
        with pytest.raises(UserError) as error:
            command.main([*flags])
        assert "\n" not in str(error.value)
        return str(error.value)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port} cannot be had (Address already in use)" in fault("--model", folder, "--port", str(port))
    assert "--host nowhere.invalid" in fault("--model", folder, "--host", "nowhere.invalid")
    assert "70000 must be from 1 to 65535" in fault("--model", folder, "--port", "70000")
    assert "max_new_tokens: 0 must be" in fault("--model", folder, "--max_new_tokens", "0")
    assert "--share" in fault("--model", folder, "--share")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert "the chat page needs gradio: pip install gradio pypdf" in fault("--model", folder, "--port", "7999")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "gone is not a folder" in fault("--model", str(tmp_path / "gone"), "--port", "7999")


def test_the_command_ends_with_one_line(folder):
    """Catches: an exit code that says all is well, a line of some library beside our own."""
    code = [sys.executable, "-m", "longlora_jax.chat", "--model", folder, "--port", "none"]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# In a browser


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of the page over a model with a window of 4,096; skips where gradio is not there."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs gradio")
    model = make_model(tmp_path_factory.mktemp("served") / "model", 4096)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = [
        sys.executable,
        "-m",
        "longlora_jax.chat",
        "--model",
        model,
        "--port",
        str(port),
        "--max_new_tokens",
        "3000",
    ]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(code, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            lines = []
            for line in server.stderr:
                lines.append(line)
                if "Ctrl-C" in line:
                    break
            assert lines[-1].startswith(f"http://127.0.0.1:{port}"), lines
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.kill()


class Page:
    """The page in a tab, with what it complained of and what it fetched elsewhere."""

    def __init__(self, browser, address: str, width: int):
        self.tab = browser.new_page(viewport={"width": width, "height": 800})
        self.faults: list[str] = []
        self.tab.on("console", lambda m: self.faults.append(m.text) if m.type == "error" else None)
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.faults.append(dialog.message), dialog.dismiss()))
        self.tab.on("request", lambda r: None if r.url.startswith((address, "data:")) else self.faults.append(r.url))
        self.tab.goto(address)
        self.tab.wait_for_selector(".meter")

    def load(self, name: str, content: bytes) -> None:
        self.tab.set_input_files("input[type=file]", {"name": name, "mimeType": "text/plain", "buffer": content})

    def ask(self, question: str) -> None:
        self.tab.fill("textarea", question)
        self.tab.keyboard.press("Enter")

    def wait(self, text: str) -> None:
        self.tab.get_by_text(text).first.wait_for()

    def answers(self) -> list[str]:
        return self.tab.locator(".answered").all_inner_texts()

    def fits(self) -> bool:
        return self.tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def grown(page: Page, longer: int) -> int:
    """Waits until the last answer has more characters than these, for 60 seconds at most."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if page.answers() and len(page.answers()[-1]) > longer + len("Model\n"):
            return len(page.answers()[-1])
        time.sleep(0.05)
    raise AssertionError(f"it does not grow: {page.answers()}")


@pytest.mark.parametrize("width", [1280, 375])
def test_in_a_browser(browser, served, width):
    """Catches: an answer that comes all at once, a stop that stops nothing, a document lost after the first question,
    a page wider than a phone, a font from elsewhere, a tag of a document's name or of a question that comes alive."""
    page = Page(browser, served, width)
    page.load(f"{EVIL}.txt", f"{BOOK.text} {EVIL}".encode())
    page.wait(" tokens (")
    page.wait("free 3,")
    assert page.fits()
    page.ask(f"Who? {EVIL} ${{alert(2)}}")
    length = grown(page, 10)
    assert grown(page, length) > length
    assert page.tab.get_by_role("button", name="Ask", exact=True).count() == 0
    page.tab.get_by_role("button", name="Stop").click()
    page.wait("; stopped")
    stopped = page.answers()[0]
    page.ask("When?")
    page.tab.locator(".answered").nth(1).wait_for()
    grown(page, 10)
    assert page.answers()[0] == stopped and page.fits()
    page.wait("known already")
    page.tab.get_by_role("button", name="New conversation").click()
    page.wait("conversation 0")
    assert page.tab.locator(".asked").count() == 0 and "free 3," in page.tab.inner_text("body")
    page.tab.get_by_role("button", name="Ask", exact=True).wait_for()
    page.ask(EVIL)
    grown(page, 10)
    assert page.tab.locator(".asked").inner_text() == f"You\n{EVIL}"
    page.tab.get_by_role("button", name="Stop").click()
    page.wait("; stopped")
    assert page.tab.locator("img").count() == 0 and page.faults == []


def test_faults_are_lines_of_the_page(browser, served):
    """Catches: a fault that is told as "Error", or not at all; a page that is dead after it."""
    page = Page(browser, served, 1280)
    alert = page.tab.locator("[role=alert]")
    for name, content, message in (
        ("binary.txt", b"\0\1\2", "binary.txt is a binary file"),
        ("empty.md", b" ", "empty.md is empty"),
        ("long.txt", (BOOK.text * 200).encode(), "but the model's window is 4,096"),
    ):
        page.load(name, content)
        page.wait(message)
        assert alert.count() == 1 and "\n" not in alert.inner_text()
        page.tab.get_by_label("Clear").first.click()
        page.wait("Drop File Here")
    page.ask(" ")
    page.wait("the question is empty")
    assert page.faults == []
