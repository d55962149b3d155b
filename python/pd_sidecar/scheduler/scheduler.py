"""The scheduler's half: decides which requests move KV, and tells the workers in each step.

The scheduler's half has no timers and sends no message twice: the sidecar and the workers enforce the deadlines. One
object holds the state of a request.

    Push (prefill)
      WAITING ── first step ──▶ RUNNING ── finished ──▶ HELD ── workers report ──▶ gone
                                   └────── aborted ──▶ gone
      A request that names no receiver is HELD until a decode side has fetched its KV, or none does in time. Meanwhile
      the engine does not step for it.
    Load (decode)
      OFFERED ── has blocks ──▶ PARKED ── workers report ──▶ SETTLED ── finished ──▶ gone
         │                         └── aborted ──▶ ABORTED ── workers report ──▶ gone
         └── nothing to load ──▶ SETTLED

With n > 1 vLLM makes one engine request per sequence, and all of these requests have the same prompt. The first request
loads the KV. The other requests wait until the first request runs. Then the other requests copy the KV that they lack
from the blocks of the first request, so the KV is moved only once. With windows or states they can do this only in the
first request's first step (`sequences`).

With a list of prompts vLLM makes one engine request per prompt, all with the same `kv_transfer_params`. Each prompt is
a transfer of its own: both sides add the number of the prompt to its `req`.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from pd_sidecar.scheduler.adapters import Adapters
from pd_sidecar.scheduler.eligibility import Skip, Transfer, family, transfer, unserved
from pd_sidecar.scheduler.kept import Keeping, new_token
from pd_sidecar.scheduler.local_cache import LocalCache
from pd_sidecar.scheduler.metadata import CopyStart, LoadStart, PushStart, PushStep, StepMetadata
from pd_sidecar.scheduler.scheduled import scheduled, tables_now
from pd_sidecar.scheduler.sequences import blocks_to_copy, is_at_its_first_step
from pd_sidecar.scheduler.states import Load, LoadPhase, Push, PushPhase, Skipped
from pd_sidecar.scheduler.tables import blocks_of, covers, used
from pd_sidecar.scheduler.tagging import tags_of, untagged
from pd_sidecar.scheduler.truncation import media_beyond, truncate

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from pd_sidecar.kv.keys import ChunkHasher
    from pd_sidecar.scheduler.older_vllm import EngineScheduler
    from pd_sidecar.scheduler.states import Role, State
    from pd_sidecar.scheduler.stats import Stats
    from pd_sidecar.scheduler.tables import Tables


logger = init_logger("vllm.pd_sidecar.scheduler.scheduler")


class Scheduler:
    """Tracks the state of each request, and tells the workers about it in each step."""

    def __init__(self, role: Role, hasher: ChunkHasher, stats: Stats, adapters: Adapters | None = None) -> None:
        self._role = role
        self._hasher = hasher
        self._stats = stats
        self._adapters = adapters or Adapters()
        self._states: dict[str, State] = {}
        self._claims: OrderedDict[tuple[bool, str], str] = OrderedDict()
        self._next = StepMetadata()
        self._held = 0
        self.keeping = Keeping(role.keep)
        self.local_cache = LocalCache(role.tables, is_on=role.has_prefix_cache)
        self.engine: EngineScheduler | None = None
        """vLLM's scheduler, if this vLLM does not pass the whole block tables of several groups."""
        self.manager: KVCacheManager | None = None
        """The manager of vLLM's blocks, if vLLM has passed it."""
        self.unmoved = False
        """True if the workers cannot move this model's KV. The scheduler then starts no transfer."""

    def bind(self, manager: KVCacheManager) -> None:
        """Takes the manager of vLLM's blocks. Call this before the first request."""
        self.manager = manager
        self.local_cache.bind(manager)

    def arrived(self, request: Request) -> None:
        """Handles a request that vLLM puts into its queue: its KV must not expire while the request waits, and a prompt
        must be cut before vLLM computes it.
        """
        params = request.kv_transfer_params
        if not isinstance(params, dict) or not ("pd" in params or self._role.backoff):
            return
        state = self._state(request)
        if isinstance(state, Push) and self._role.backoff:
            truncate(request, state.tokens)

    def matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """Returns the number of tokens beyond `computed` that will be loaded; `None` if this number is not known yet.
        vLLM may call this method several times for one request.
        """
        state = self._state(request)
        if not isinstance(state, Load) or state.phase is not LoadPhase.OFFERED:
            # vLLM asks again after a load, even after a failed load. If the connector asked for a second load, its KV
            # would never arrive.
            return 0, False
        if state.source is not None:
            if state.source.request.request_id not in self._states:
                # The source request has ended, and its blocks may belong to another request now.
                state.phase = LoadPhase.SETTLED
                return 0, False
            if self._role.is_plain:
                if not state.source.is_copyable(self._blocks_of(state.source.pushed_tokens)):
                    return None, False
            elif not (is_now := is_at_its_first_step(state.source)):
                if is_now is False:
                    state.phase = LoadPhase.SETTLED
                    self._stats.add_reason("skipped", Skip.KV_GROUPS.value)
                return (None if is_now is None else 0), False
        state.have_tokens = computed
        count = state.pushed_tokens - computed
        return (count, True) if count > 0 else (0, False)

    def allocated(self, request: Request, tables: Tables, external_tokens: int) -> None:
        """Records the blocks that vLLM allocated for the tokens to load, by group."""
        state = self._state(request)
        if not isinstance(state, Load) or state.phase is not LoadPhase.OFFERED:
            return
        if external_tokens <= 0:
            state.phase = LoadPhase.SETTLED
            if state.source is not None:
                return
            self._stats.add_reason("skipped", Skip.NOTHING_TO_LOAD.value)
            self._next.dismissed.append(state.transfer.req)
            return
        state.phase = LoadPhase.PARKED
        if state.source is not None and not self._role.is_plain:
            self.local_cache.exclude_partial(request.request_id, state.have_tokens, state.pushed_tokens)
            self._next.copy_starts.append(self._copy_start(state, tables))
            self._stats.add("copied_tokens", external_tokens)
            return
        if state.source is not None:
            first = state.have_tokens // self._role.block_tokens
            last = self._blocks_of(state.have_tokens + external_tokens)
            sources, own = state.source.table[first:last], tables[0][first:last]
            self._next.copy_starts.append(CopyStart(request.request_id, (sources,), (own,)))
            self._stats.add("copied_tokens", external_tokens)
            return
        self.local_cache.exclude_partial(request.request_id, state.have_tokens, state.pushed_tokens)
        logger.info(
            "Reqid: %s, Total tokens %d, Inference Engine computed tokens: %d, hit tokens: %d, need to load: %d",
            state.transfer.req,
            request.num_prompt_tokens,
            state.have_tokens,
            state.pushed_tokens,
            external_tokens,
        )
        self._next.load_starts.append(
            LoadStart(
                engine_id=request.request_id,
                req=state.transfer.req,
                hashes=(hashes := self._hasher.chain((request.prompt_token_ids or ())[: state.pushed_tokens])),
                tags=tags_of(request, state.adapter, len(hashes), self._hasher.chunk_tokens),
                tokens=state.pushed_tokens,
                have_tokens=state.have_tokens,
                load_tokens=state.have_tokens + external_tokens,
                tables=used(self._role.tables, tables),
                missing_blocks=tables[0][state.have_tokens // self._role.block_tokens :],
                written=state.transfer.written,
                source=state.transfer.kept,
            )
        )

    def _copy_start(self, state: Load, tables: Tables) -> CopyStart:
        assert state.source is not None
        assert self.manager is not None
        engine_id = state.request.request_id
        sources = self.manager.get_block_ids(state.source.request.request_id)
        found = blocks_to_copy(self._role.tables, sources, tables, state.pushed_tokens)
        if found is None:
            return CopyStart(engine_id, (), (blocks_of(tables),), is_possible=False)
        return CopyStart(engine_id, *found)

    def step(self, output: SchedulerOutput) -> StepMetadata:
        """Returns the message to the workers for this step."""
        for engine_id, tables, replace, computed in scheduled(output):
            state = self._states.get(engine_id)
            if isinstance(state, Push):
                upto = computed + output.num_scheduled_tokens[engine_id]
                self._push_step(engine_id, state, output, tables, replace=replace, upto=upto)
            elif isinstance(state, Load):
                self._track(state, tables[0] if tables else [], replace)
        if self._role.producer:
            for engine_id, state in self._states.items():
                if isinstance(state, Push) and _lost_its_blocks(state):
                    state.preempted, state.upto = True, 0
                    self._next.preempted.append(engine_id)
        self.keeping.answers.clear()
        metadata, self._next = self._next, StepMetadata()
        metadata.idle = output.total_num_scheduled_tokens == 0
        return metadata

    def finished(self, request: Request, tables: Tables, *, completed: bool) -> tuple[bool, dict[str, Any] | None]:
        """Ends a request. Returns two values: true if the request's blocks stay until the workers report the request,
        and the parameters of the response.
        """
        engine_id = request.request_id
        state = self._states.get(engine_id)
        if state is None:
            # vLLM never asked about this request. For example, vLLM makes some requests only to report a rejection.
            state = self._states[engine_id] = self._classify(request)
        if isinstance(state, Push):
            return self._finish_push(engine_id, state, tables, completed)
        if isinstance(state, Load) and state.phase is LoadPhase.PARKED:
            # vLLM itself holds the blocks of a parked request until the workers report the request.
            state.phase = LoadPhase.ABORTED
            if state.source is None:
                self._next.aborted.append(engine_id)
            return False, None
        del self._states[engine_id]
        if isinstance(state, Load) and state.phase is LoadPhase.OFFERED and state.source is None:
            self._next.dismissed.append(state.transfer.req)
        if isinstance(state, Skipped) and state.reason is not Skip.NO_PARAMS:
            return False, self._not_pushed(request, state.reason)
        return False, None

    def reported(self, sent: Collection[str], received: Collection[str]) -> set[str]:
        """Handles the workers' report that these requests are done. Returns the requests that vLLM has forgotten
        already.
        """
        forgotten = {engine_id for engine_id in sent if engine_id in self.keeping.pinned}
        for engine_id in received:
            state = self._states.get(engine_id)
            if isinstance(state, Load):
                if state.phase is LoadPhase.ABORTED:
                    del self._states[engine_id]
                else:
                    state.phase = LoadPhase.SETTLED
        for engine_id in sent:
            is_push = isinstance(self._states.pop(engine_id, None), Push)
            if not self.keeping.release(engine_id) and is_push:
                self._held -= 1
        return forgotten

    def correct_answers(self) -> None:
        """Corrects the answers of this step, which vLLM has not sent yet, after a report about fetch ports."""
        self.keeping.correct_answers(self._role.ranks, Skip.NO_FETCH_PORT.value)

    @property
    def has_work(self) -> bool:
        """True if the engine must run another step, even if no request is left."""
        return self._held > 0 or self._next.has_news

    def _state(self, request: Request) -> State:
        state = self._states.get(request.request_id)
        if state is None:
            state = self._classify(request)
            self._states[request.request_id] = state
            if isinstance(state, Skipped):
                self._stats.add_reason("skipped", state.reason.value)
        return state

    def _classify(self, request: Request) -> State:
        # Ask for the digest even if this request has no transfer, so that the digest is known when a later request
        # needs it.
        adapter = self._adapters.digest(request.lora_request) if request.lora_request is not None else ""
        wish = transfer(request.kv_transfer_params, request.request_id)
        if isinstance(wish, Skip):
            return Skipped(wish)
        if not wish.req:
            # The two engines know a request without `req` under different ids. The messages between the sidecars have
            # the decode side's id.
            wish = dataclasses.replace(wish, req=request.request_id)
        skip = unserved(request)
        tokens = request.num_prompt_tokens
        if wish.is_push and not wish.wants_first_token:
            # Without the first token from prefill, the decode side computes the last prompt token.
            tokens -= self._role.backoff
        if self.unmoved:
            skip = Skip.LAYOUT
        elif not (self._role.producer if wish.is_push else self._role.consumer):
            skip = Skip.WRONG_ROLE
        elif wish.keeps and not self.keeping.is_possible(self._role.ranks):
            skip = Skip.NO_FETCH_PORT
        elif wish.kept is not None and len(wish.kept.ports) != self._role.ranks:
            skip = Skip.TP_MISMATCH
        elif wish.host and len(wish.init_ports) != self._role.ranks:
            skip = Skip.TP_MISMATCH
            logger.warning_once(
                "not pushed: %s takes KV in %d ranks, but this engine divides it into %d; set `ranks` of both "
                "connectors, and the number of ports, to the larger tensor-parallel size",
                wish.host,
                len(wish.init_ports),
                self._role.ranks,
            )
        elif not wish.is_push and not self.local_cache.is_safe:
            skip = Skip.KV_GROUPS
        elif skip is None and isinstance(adapter, Skip):
            skip = adapter
        elif skip is None and wish.written:
            skip = untagged(request)
        elif skip is None and tokens <= 0:
            skip = Skip.NOTHING_TO_LOAD
        elif skip is None and media_beyond(request, tokens):
            skip = Skip.MULTIMODAL
        if skip is not None:
            if not wish.is_push and self._role.consumer:
                self._expect(wish)
                self._next.dismissed.append(wish.req)
            if wish.is_push and wish.wants_first_token and self._claim(wish, request.request_id):
                self._next.unpushed.append(self._start(request, wish))
            return Skipped(skip)
        weights = "" if isinstance(adapter, Skip) else adapter
        if not self._claim(wish, request.request_id):
            source = self._source(wish, request)
            if source is not None and not self._role.is_plain and self.manager is None:
                return Skipped(Skip.KV_GROUPS)
            if source is None:
                return Skipped(Skip.DUPLICATE)
            return Load(request, wish, weights, backoff=self._role.backoff, source=source)
        if wish.is_push:
            return Push(request, wish, weights, token=new_token() if wish.keeps else "", tokens=tokens)
        self._expect(wish)
        return Load(request, wish, weights, backoff=self._role.backoff)

    def _expect(self, wish: Transfer) -> None:
        if wish.kept is not None:
            self._next.expected.append((wish.req, wish.kept))

    def _source(self, wish: Transfer, request: Request) -> Load | None:
        """Returns the request that loads the same prompt for another sequence of the same client request (n > 1);
        `None` if there is none.
        """
        holder = self._claims[wish.is_push, wish.claim]
        state = self._states.get(holder)
        if not isinstance(state, Load) or family(holder) != family(request.request_id):
            return None
        return state if state.request.prompt_token_ids == request.prompt_token_ids else None

    def _track(self, state: Load, blocks: list[int], replace: bool) -> None:
        """Records the blocks that a request has in this step, for the other sequences of its client request."""
        needed = self._blocks_of(state.pushed_tokens)
        if replace:
            state.table, state.preemptions = list(blocks[:needed]), state.request.num_preemptions
        elif len(state.table) < needed:
            state.table = (state.table + blocks)[:needed]

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self._role.block_tokens)

    def _claim(self, wish: Transfer, engine_id: str) -> bool:
        """Assigns a `req` to the first engine request that asks for it, and returns true only for this request. With
        n > 1 several engine requests have the same `req`.

        A claim stays after its holder has ended, because vLLM may ask much later about the other requests of the same
        client request. But LMCache's proxy numbers its requests from 1 at each start, so the same `req` can come again.
        So if the holder has ended, an engine request that belongs to another client request gets the claim.
        """
        if wish.keeps:
            return True  # each engine request has a token of its own
        key = (wish.is_push, wish.claim)
        holder = self._claims.setdefault(key, engine_id)
        if holder != engine_id:
            state = self._states.get(holder)
            settled = isinstance(state, Load) and state.phase is LoadPhase.SETTLED
            under_way = isinstance(state, (Push, Load)) and not settled
            if under_way or family(holder) == family(engine_id):
                return False
            self._claims[key] = engine_id
            self._claims.move_to_end(key)
        if len(self._claims) > MAX_CLAIMS:
            self._claims.popitem(last=False)
        return True

    @staticmethod
    def _start(
        request: Request,
        wish: Transfer,
        hashes: Sequence[str] = (),
        tags: Sequence[str] = (),
        tokens: int | None = None,
    ) -> PushStart:
        return PushStart(
            engine_id=request.request_id,
            req=wish.req,
            host=wish.host,
            init_ports=wish.init_ports,
            alloc_ports=wish.alloc_ports,
            hashes=list(hashes),
            tags=list(tags),
            tokens=request.num_prompt_tokens if tokens is None else tokens,
            overlap=wish.overlap,
        )

    def _push_step(
        self, engine_id: str, state: Push, output: SchedulerOutput, tables: Tables, *, replace: bool, upto: int
    ) -> None:
        tokens = state.tokens
        if state.phase is PushPhase.WAITING:
            state.phase = PushPhase.RUNNING
            hashes = self._hasher.chain((state.request.prompt_token_ids or ())[:tokens])
            tags = tags_of(state.request, state.adapter, len(hashes), self._hasher.chunk_tokens)
            start = self._start(state.request, state.to, hashes, tags, tokens)
            self._next.push_starts.append(dataclasses.replace(start, token=state.token, keep_ms=self.keeping.keep_ms))
        elif replace:
            # The request was preempted and resumed within one step: it has a new table, and no token counts as
            # computed.
            state.upto = 0
        if state.upto >= tokens:
            return
        state.upto = min(upto, tokens)
        state.preempted = False
        whole = tables_now(output, engine_id) if self._role.backoff else None
        if whole is None and self.engine is not None:
            whole = self.engine.tables(engine_id)
        if whole is None:
            # vLLM's model runner may be in this process, and appends to the same lists.
            own = tuple(list(blocks) for blocks in tables)
            self._next.push_steps.append(PushStep(engine_id, own, replace, state.upto))
        else:
            own = used(self._role.tables, whole)
            self._next.push_steps.append(PushStep(engine_id, own, replace, state.upto, is_whole=True))

    def _finish_push(
        self, engine_id: str, state: Push, tables: Tables, completed: bool
    ) -> tuple[bool, dict[str, Any] | None]:
        # A request may have begun before the scheduler learned that the workers move no KV.
        refused = Skip.LAYOUT if self.unmoved else None
        is_whole = covers(self._role.tables, tables, state.tokens)
        if refused is None and completed and state.phase is PushPhase.RUNNING and is_whole:
            if not state.token:
                self._held += 1
            elif not self.keeping.is_possible(self._role.ranks):
                refused = Skip.NO_FETCH_PORT
            elif not self.keeping.hold(engine_id, blocks_of(tables)):
                refused = Skip.KEEP_FULL
            if refused is None:
                state.phase = PushPhase.HELD
                self._next.finished.append(engine_id)
                return engine_id not in self.keeping.pinned, self._response(state)
            self._stats.add_reason("skipped", refused.value)
        if state.phase is PushPhase.RUNNING:
            self._next.cancelled.append(engine_id)
        del self._states[engine_id]
        if refused is not None:
            return False, self._not_pushed(state.request, refused)
        return False, _first_token(state.request, {}) or None

    def _response(self, state: Push) -> dict[str, Any]:
        """Returns the `kv_transfer_params` of a prefill leg's answer."""
        if state.token:
            return self.keeping.answer(state.token, state.tokens)
        return _first_token(state.request, {"pushed": True, "req_id": state.to.req})

    def _not_pushed(self, request: Request, reason: Skip) -> dict[str, Any]:
        """Returns the `kv_transfer_params` of an answer whose KV is not pushed."""
        params = request.kv_transfer_params
        if isinstance(params, dict) and params.get("do_remote_decode") and params.get("disagg_spec") is None:
            return self.keeping.refusal(reason.value)
        return _first_token(request, {"pushed": False, "reason": reason.value})


def _first_token(request: Request, response: dict[str, Any]) -> dict[str, Any]:
    """Adds the first token if the proxy asks for it. A proxy that asks cannot learn the token in another way."""
    params = request.kv_transfer_params
    if isinstance(params, dict) and params.get("ret_first_tok") and request.output_token_ids:
        response["first_tok"] = request.output_token_ids[0]
    return response


def _lost_its_blocks(state: Push) -> bool:
    """Returns true if the request was preempted and the workers do not know it yet. The status has the same name in all
    versions of vLLM.
    """
    return state.phase is PushPhase.RUNNING and not state.preempted and state.request.status.name == "PREEMPTED"


MAX_CLAIMS = 4096
"""Maximum number of claims. A sidecar remembers 4096 ended requests, too."""
