"""A client of OpenAI-compatible chat servers: bounded concurrency, retries, and a key that is shown nowhere."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from prefopt.errors import BadInput, PrefoptError, TryAgain

log = logging.getLogger(__name__)

Reply = TypeVar("Reply")
Request = Mapping[str, Any]

_ASK_LATER = frozenset({408, 409, 425, 429})
_REFUSED_KEY = frozenset({401, 403})
_LOGPROBS = ("logprobs", "top_logprobs")
_LONGEST_WAIT = 60.0


class _Trouble(Exception):
    """Something that may pass; ``wait`` is how many seconds the server asked for."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass
class ChatClient:
    """Posts to ``<base_url>/chat/completions``, at most ``concurrency`` requests at a time.

    429, 408, 409, 425, 5xx, time-outs, cut connections and replies that are no chat completion are tried again up to
    ``retries`` times, after ``first_wait`` seconds that double each time (at random below that, at most a minute) or
    after the server's Retry-After, whichever is longer; Retry-After holds back every other request too.
    """

    base_url: str
    api_key: str | None = field(default=None, repr=False)
    key_name: str | None = None
    concurrency: int = 8
    timeout_seconds: float = 60.0
    retries: int = 6
    first_wait: float = 1.0
    _not_before: float = field(default=0.0, init=False, repr=False)
    _plain: bool = field(default=False, init=False, repr=False)

    def ask_all(
        self, requests: Sequence[Request], read: Callable[[Any], Reply], keep: Callable[[int, Reply], None]
    ) -> None:
        """Send all requests; ``keep(number, read(reply))`` as each reply arrives.

        After a failure nothing new is sent, but what is on its way is waited for and kept. Raises TryAgain where a
        request fails to the end, and BadInput where the server refuses it.
        """
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it tells of every request at the level info
        asyncio.run(self._ask_all(requests, read, keep))

    async def _ask_all(
        self, requests: Sequence[Request], read: Callable[[Any], Reply], keep: Callable[[int, Reply], None]
    ) -> None:
        waiting = iter(enumerate(requests))
        failures: list[Exception] = []
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx2.Limits(max_connections=self.concurrency)
        async with httpx2.AsyncClient(headers=headers, timeout=self.timeout_seconds, limits=limits) as http:
            workers = (self._work(http, waiting, read, keep, failures) for _ in range(self.concurrency))
            await asyncio.gather(*workers)
        if failures:
            raise failures[0]

    async def _work(
        self,
        http: httpx2.AsyncClient,
        waiting: Iterator[tuple[int, Request]],
        read: Callable[[Any], Reply],
        keep: Callable[[int, Reply], None],
        failures: list[Exception],
    ) -> None:
        while not failures and (drawn := next(waiting, None)) is not None:
            number, request = drawn
            try:
                keep(number, await self._patient(http, request, read))
            except _Trouble as trouble:
                tries = self.retries + 1
                failures.append(
                    TryAgain(f"{self.base_url}: {trouble}, {tries} times; answers so far are kept, run again to go on")
                )
            except Exception as error:  # told after the answers on their way have arrived and been kept
                failures.append(error)

    async def _patient(self, http: httpx2.AsyncClient, request: Request, read: Callable[[Any], Reply]) -> Reply:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Trouble),
            stop=stop_after_attempt(self.retries + 1),
            wait=self._wait,
            reraise=True,
        )
        return await retrying(self._once, http, request, read)

    def _wait(self, state: RetryCallState) -> float:
        backoff = wait_random_exponential(multiplier=self.first_wait, max=_LONGEST_WAIT)(state)
        asked: float = state.outcome.exception().wait
        self._not_before = max(self._not_before, time.monotonic() + asked) if asked else self._not_before
        return max(backoff, asked)

    async def _once(self, http: httpx2.AsyncClient, request: Request, read: Callable[[Any], Reply]) -> Reply:
        await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
        body = {key: value for key, value in request.items() if not (self._plain and key in _LOGPROBS)}
        try:
            response = await http.post(f"{self.base_url.rstrip('/')}/chat/completions", json=body)
        except httpx2.TransportError as error:
            raise _Trouble(f"no reply ({type(error).__name__})") from None
        status = response.status_code
        if status in _ASK_LATER or status >= 500:
            raise _Trouble(f"HTTP {status}", retry_after(response.headers.get("retry-after", "")))
        if status in (400, 422) and "logprobs" in body and "logprobs" in response.text:
            log.warning("%s: refuses requests for log-probabilities; only its texts are read", self.base_url)
            self._plain = True
            return await self._once(http, request, read)
        if status != 200:
            raise self._refusal(response)
        try:
            return read(response.json())
        except (LookupError, TypeError, ValueError):
            raise _Trouble("a reply that is no chat completion") from None

    def _refusal(self, response: httpx2.Response) -> PrefoptError:
        status = response.status_code
        if status in _REFUSED_KEY:  # such replies may quote the key
            key = f"the key in the environment variable {self.key_name}" if self.key_name else "requests without a key"
            return BadInput(
                f"{self.base_url}: HTTP {status}, the server refuses {key}; set 'api_key_env' in judges.yaml"
            )
        said = response.text.replace(self.api_key, "***") if self.api_key else response.text
        return BadInput(f"{self.base_url}: HTTP {status}, the server refuses the request: {said[:300]}")


def retry_after(header: str) -> float:
    """Seconds that a Retry-After header asks for, given as a number or as a date; 0 for anything else."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
