"""A server on loopback over a tiny model whose `ar` text is known, and clients of it."""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import openai
import pytest
import tokenizers
import torch
import uvicorn
from fastapi import FastAPI

from twotower.checkpoints.chat_template import ChatTemplate
from twotower.engine.aio import AsyncEngine
from twotower.engine.config import EngineConfig
from twotower.model.two_tower import TwoTower
from twotower.server.app import make_app
from twotower.server.config import ServerConfig

# All bytes are different, so that a byte says which one follows; characters have one to four.
CYCLE = "ab 🎉é…z"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}a"
)


@pytest.fixture(scope="session")
def model(tiny: Callable[..., TwoTower], byte_tokenizer: tokenizers.Tokenizer) -> TwoTower:
    """Its context tower goes round CYCLE from any of its bytes; its denoiser is random."""
    made = tiny("*-M", vocab_size=260, hidden_size=64, block_size=8)
    made.tokenizer = byte_tokenizer
    tensors = made.released_tensors()
    for name, tensor in tensors.items():
        if name.startswith("context_tower") and name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            tensor.zero_()  # only the newest token's embedding reaches the head
    cycle = torch.tensor(byte_tokenizer.encode(CYCLE).ids)
    tensors["context_lm_head.weight"].mul_(0.1)
    tensors["context_lm_head.weight"][cycle.roll(-1)] = tensors["context_tower.embeddings.weight"][cycle]
    return made


@pytest.fixture(scope="session")
def engine(model: TwoTower) -> Iterator[AsyncEngine]:
    made = AsyncEngine(model, EngineConfig(max_num_requests=4, max_num_waiting=12)).start()
    yield made
    made.close()


@pytest.fixture(scope="session")
def app(engine: AsyncEngine) -> FastAPI:
    return make_app(engine, ServerConfig(model_names=("tiny",), max_context=2000), ChatTemplate(TEMPLATE, {}))


class Served(NamedTuple):
    """A running server."""

    url: str
    server: uvicorn.Server
    thread: threading.Thread


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[Served]:
    """Serves on a free port of loopback until left."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, http="h11", log_config=None, timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", server, thread)
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def serve() -> Callable[[FastAPI], contextlib.AbstractContextManager[Served]]:
    """serve(app) runs another server while it is entered."""
    return serving


@pytest.fixture(scope="session")
def url(app: FastAPI) -> Iterator[str]:
    with serving(app) as served:
        yield served.url


@pytest.fixture(scope="session")
def obedient_url(tiny: Callable[..., TwoTower], byte_tokenizer: tokenizers.Tokenizer) -> Iterator[str]:
    """A server of a model that can end its texts, so that it writes what a request's `regex` says; its answers have
    calls and reasoning."""
    made = tiny("M*-E", vocab_size=260, eos_token_id=2, block_size=8)
    made.tokenizer = byte_tokenizer
    engine = AsyncEngine(made).start()
    template = (
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content "
        "}}{{ m.reasoning_content or '' }}{{ m.tool_calls or '' }}{% endfor %}{% if x %}<tool_call><think>{% endif %}"
    )
    config = ServerConfig(model_names=("tiny",), max_context=3000, reasoning_parser="qwen3")
    with serving(make_app(engine, config, ChatTemplate(template, {}))) as served:
        yield served.url
    engine.close()


@pytest.fixture(scope="session")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives it; pip install 'twotower[dev]'")
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in found:
        pytest.skip("no browser here: the page's tests need chromium and chromedriver (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(found[1])) as opened:
        yield opened


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """wait_until(condition) fails where it does not come to be within some seconds."""

    def wait(condition: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to be"
            time.sleep(0.005)

    return wait


@pytest.fixture(autouse=True)
def _idle(engine: AsyncEngine, wait_until: Callable[..., None]) -> Iterator[None]:
    """Every test leaves the engine idle."""
    yield
    wait_until(lambda: engine.stats().num_running + engine.stats().num_waiting == 0)
