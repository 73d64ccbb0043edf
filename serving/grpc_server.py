"""The gRPC door: TensorFlow Serving's services as its clients call them, our recommend call, health and reflection.

Status codes and their sentences are those of TensorFlow Serving where clients are known to compare them. Everything
runs on one event loop: a call waits for its batch without holding a thread, so that the bounded queue of the batcher,
and not a pool of threads, decides what is refused.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_pb2,
    model_service_pb2,
    predict_pb2,
    prediction_service_pb2,
    regression_pb2,
)

from fusion.export.manifest import Signature
from serving.client import wire
from serving.errors import DeadlineExceeded, Forbidden, InvalidRequest, Overloaded, ServingError
from serving.inputs import Arrays
from serving.members import gone_round
from serving.messages import BEST, ItemList, RecommendRequest, SimilarRequest
from serving.metrics import METRICS
from serving.model_config import model_configs
from serving.model_store import ModelStore, Servable
from serving.recommending import Compute, InThread
from serving.security import TokenInterceptor, Tokens
from serving.settings import GrpcSettings
from serving.tensors import decode, predict_response
from serving.tf_examples import classified, example_inputs, regressed
from serving.warmup import SERVING_DEFAULT

logger = logging.getLogger(__name__)

PREDICTION = prediction_service_pb2.DESCRIPTOR.services_by_name["PredictionService"].full_name
MODELS = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name
HEALTH = "grpc.health.v1.Health"
SERVICES = (PREDICTION, MODELS, wire.RECOMMENDATION_SERVICE, HEALTH, reflection.SERVICE_NAME)
CLASSIFY, REGRESS = "tensorflow/serving/classify", "tensorflow/serving/regress"
SIGNATURE_DEF = "signature_def"
LARGE = 64 * 1024
"""Bytes of a message that the event loop reads or writes itself; the work of more would keep other callers waiting."""
WATCH_S = 0.5
"""How soon whoever watches the health of the server hears of a change."""


class Recommends(Protocol):
    """What answers our own service (`serving.recommending.Recommending`). `recommend_soon` is called on the event loop,
    `similar` from several threads."""

    async def recommend_soon(self, request: RecommendRequest, compute: Compute, in_thread: InThread) -> ItemList: ...

    def similar(self, request: SimilarRequest) -> ItemList: ...


class GrpcDoor:
    """The services on one `grpc.aio` server.

    Args:
        store: the models.
        recommending: answers our own service.
        settings: how the door behaves.
        credentials: of the server, None without TLS.
        tokens: who may call; None lets everybody in.
        admin: who may call `HandleReloadConfigRequest`; None turns it off.
    """

    def __init__(
        self,
        store: ModelStore,
        recommending: Recommends,
        settings: GrpcSettings | None = None,
        credentials: Any = None,
        tokens: Tokens | None = None,
        admin: Tokens | None = None,
    ) -> None:
        self._store, self._recommending = store, recommending
        self._settings, self._credentials = settings or GrpcSettings(), credentials
        self._tokens, self._admin = tokens, admin
        self._server: Any = None
        self._stopping = False
        self._pool = ThreadPoolExecutor(self._settings.threads, thread_name_prefix="recommend")
        self._places = threading.BoundedSemaphore(self._settings.threads + self._settings.queue)

    async def start(self, host: str, port: int, shared_port: bool = False) -> int:
        """Opens the port and returns its number.

        Args:
            host: `127.0.0.1`, `::1`, or `0.0.0.0` for all.
            port: 0 takes a free one.
            shared_port: whether other processes listen on the same port (SO_REUSEPORT).

        Raises OSError when the port cannot be opened.
        """
        self._completions = _Completions(asyncio.get_running_loop())
        limit = self._settings.max_message_bytes
        server = grpc.aio.server(
            interceptors=[] if self._tokens is None else [TokenInterceptor(self._tokens)],
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", int(shared_port)),
                ("grpc.max_metadata_size", 16 * 1024),
            ],
            maximum_concurrent_rpcs=self._settings.calls,
        )
        server.add_generic_rpc_handlers(self._handlers())
        descriptor_pool.Default().AddSerializedFile(wire.POOL.FindFileByName(wire.RECOMMENDATION_FILE).serialized_pb)
        reflection.enable_server_reflection(SERVICES, server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._credentials is None:
                bound = server.add_insecure_port(address)
            else:
                bound = server.add_secure_port(address, self._credentials)
        except RuntimeError as error:  # what grpcio raises for everything
            raise OSError(f"the port {port} of {host} cannot be opened") from error
        await server.start()
        self._server = server
        return int(bound)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, lets those inside finish for so many seconds, and closes the port."""
        self._stopping = True
        if self._server is not None:
            await self._server.stop(grace_s)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _handlers(self) -> tuple[Any, ...]:
        services: dict[str, dict[str, Callable[[bytes, _Call], Awaitable[bytes]]]] = {
            PREDICTION: {
                "Predict": self._predict,
                "Classify": self._classify,
                "Regress": self._regress,
                "MultiInference": self._multi_inference,
                "GetModelMetadata": self._metadata,
            },
            MODELS: {"GetModelStatus": self._status, "HandleReloadConfigRequest": self._reload},
            wire.RECOMMENDATION_SERVICE: {"Recommend": self._recommend, "Similar": self._similar},
        }
        made = [
            grpc.method_handlers_generic_handler(
                service,
                {
                    method: grpc.stream_unary_rpc_method_handler(functools.partial(self._answered, method, answer))
                    for method, answer in methods.items()
                },
            )
            for service, methods in services.items()
        ]
        health = {
            "Check": grpc.unary_unary_rpc_method_handler(
                self._health,
                health_pb2.HealthCheckRequest.FromString,
                health_pb2.HealthCheckResponse.SerializeToString,
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(
                self._watch_health,
                health_pb2.HealthCheckRequest.FromString,
                health_pb2.HealthCheckResponse.SerializeToString,
            ),
        }
        return (*made, grpc.method_handlers_generic_handler(HEALTH, health))

    # ---- every call ----------------------------------------------------------------------------------------------

    async def _answered(
        self, method: str, answer: Callable[[bytes, _Call], Awaitable[bytes]], _: Any, context: Any
    ) -> bytes:
        """Answers one call, counts it, and turns errors into status codes.

        To read or to send fails on a call that its caller has left, and each failure loses 80 to 160 bytes for ever in
        grpcio (github.com/grpc/grpc/issues/43360, open at 1.85): 3 MB a minute by three callers with deadlines of 1 ms.
        So nothing is read or sent once the caller's own deadline has passed. A read that our own limit breaks off loses
        9 kB; without it, callers who never send anything would hold their places for ever. Calls are registered as
        streams, the same on the wire, because of any other kind grpcio reads the request before it asks us.
        """
        left, started = context.time_remaining(), time.monotonic()
        allowed = self._settings.timeout_s if left is None else min(left, self._settings.timeout_s)
        call, status = _Call(context, started + allowed, given=left is not None), "OK"
        try:
            if left == 0:
                raise TimeoutError
            async with asyncio.timeout_at(call.deadline):
                data = await _request(context)
                call.size = len(data)
                return await answer(data, call)
        except asyncio.CancelledError:
            status = "DEADLINE_EXCEEDED" if call.late else "CANCELLED"
            raise
        except Exception as error:
            refusal = _ours(error)
            status = refusal.grpc_code
            await _refuse(method, refusal, call)
            raise  # not reached: to refuse is to raise
        finally:
            METRICS.request(call.model, method, "GRPC", status, time.monotonic() - started)

    async def _read(self, call: _Call, kind: Any, data: bytes) -> Any:
        """The message of a request."""
        return await self._aside(call.size, lambda: _parsed(kind, data))

    async def _result(
        self, call: _Call, servable: Servable, signature: str, inputs: Callable[[], Mapping[str, Any]]
    ) -> Arrays:
        """What a signature answers for the inputs that `inputs` makes of the request."""
        predictor = servable.predictor
        arrays = await self._aside(call.size, lambda: predictor.check(signature, inputs()))
        here = not gone_round(predictor.manifest, signature)
        return await self._computed(servable, signature, arrays, call.deadline, here)

    async def _aside(self, size: int, work: Callable[[], Any]) -> Any:
        """What `work` makes of so many bytes; many are worked on in a thread."""
        return work() if size <= LARGE else await self._in_pool(lambda _: work(), None)

    async def _computed(
        self, servable: Servable, signature: str, arrays: Arrays, deadline: float | None, here: bool
    ) -> Arrays:
        """What a signature answers: quick ones on this loop, others in the thread of their batches."""
        quick = servable.soon(signature, arrays) if here else None
        if quick is not None:
            return await quick
        async with asyncio.timeout_at(deadline):
            answer: Arrays = await self._completions.result(servable.submit(signature, arrays, deadline))
            return answer

    @contextmanager
    def _leased(self, call: _Call, spec: Any) -> Iterator[Servable]:
        """The version that a ModelSpec names."""
        with self._store.lease(*_named(spec)) as servable:
            call.model = servable.name
            yield servable

    # ---- PredictionService ---------------------------------------------------------------------------------------

    async def _predict(self, data: bytes, call: _Call) -> bytes:
        request = await self._read(call, predict_pb2.PredictRequest, data)
        signature = request.model_spec.signature_name or SERVING_DEFAULT
        with self._leased(call, request.model_spec) as servable:
            specs = servable.predictor.signature(signature)
            names = _outputs(request.output_filter, specs)
            answer = await self._result(call, servable, signature, lambda: _inputs(request.inputs, specs))
            spec = _answered_by(servable, signature).SerializeToString()
        chosen = {name: answer[name] for name in names}
        return bytes(await self._aside(_size(chosen), lambda: predict_response(spec, chosen)))

    async def _classify(self, data: bytes, call: _Call) -> bytes:
        request = await self._read(call, classification_pb2.ClassificationRequest, data)
        return await self._inference(call, request, classified, classification_pb2.ClassificationResponse)

    async def _regress(self, data: bytes, call: _Call) -> bytes:
        request = await self._read(call, regression_pb2.RegressionRequest, data)
        return await self._inference(call, request, regressed, regression_pb2.RegressionResponse)

    async def _inference(self, call: _Call, request: Any, read: _Reader, response: Callable[..., Message]) -> bytes:
        """What one signature makes of examples, as `read` takes it from the outputs."""
        with self._leased(call, request.model_spec) as servable:
            answer = response(
                model_spec=_answered_by(servable, request.model_spec.signature_name or SERVING_DEFAULT),
                result=await self._inferred(call, servable, request.model_spec, request.input, read),
            )
        return _bytes(answer)

    async def _multi_inference(self, data: bytes, call: _Call) -> bytes:
        """Several signatures of one version on the same examples."""
        request = await self._read(call, inference_pb2.MultiInferenceRequest, data)
        if not request.tasks or len({_named(task.model_spec) for task in request.tasks}) > 1:
            raise InvalidRequest(
                "all tasks of a MultiInferenceRequest must name the same model; received none or several."
            )
        response = inference_pb2.MultiInferenceResponse()
        with self._leased(call, request.tasks[0].model_spec) as servable:
            for task in request.tasks:
                spec = _answered_by(servable, task.model_spec.signature_name or SERVING_DEFAULT)
                result = response.results.add(model_spec=spec)
                if task.method_name == CLASSIFY:
                    found = await self._inferred(call, servable, task.model_spec, request.input, classified)
                    result.classification_result.CopyFrom(found)
                elif task.method_name == REGRESS:
                    found = await self._inferred(call, servable, task.model_spec, request.input, regressed)
                    result.regression_result.CopyFrom(found)
                else:
                    raise InvalidRequest(
                        f"the method of a task must be {CLASSIFY} or {REGRESS}; received '{task.method_name[:100]}'."
                    )
        return _bytes(response)

    async def _inferred(self, call: _Call, servable: Servable, spec: Any, given: Any, read: _Reader) -> Any:
        """The result that `read` makes of the answer for `tf.Example`s."""
        signature = spec.signature_name or SERVING_DEFAULT
        specs = servable.predictor.signature(signature)
        shaper = read(servable.folder, specs)  # refuses a signature that does not fit before anything is computed
        limits = servable.predictor.limits
        answer = await self._result(call, servable, signature, lambda: example_inputs(given, specs, limits))
        return await self._aside(_size(answer), lambda: shaper(answer))

    async def _metadata(self, data: bytes, call: _Call) -> bytes:
        request = _parsed(get_model_metadata_pb2.GetModelMetadataRequest, data)
        if not request.metadata_field:
            raise InvalidRequest("GetModelMetadataRequest must specify at least one metadata_field")
        for name in request.metadata_field:
            if name != SIGNATURE_DEF:
                raise InvalidRequest(f"Metadata field {name[:100]} is not supported")
        with self._leased(call, request.model_spec) as servable:
            response = get_model_metadata_pb2.GetModelMetadataResponse()
            response.model_spec.name = servable.name
            response.model_spec.version.value = servable.version
            signatures = get_model_metadata_pb2.SignatureDefMap()
            for name, definition in servable.signature_defs.items():
                signatures.signature_def[name].CopyFrom(definition)
            response.metadata[SIGNATURE_DEF].Pack(signatures)
        return _bytes(response)

    # ---- ModelService --------------------------------------------------------------------------------------------

    async def _status(self, data: bytes, call: _Call) -> bytes:
        request = _parsed(get_model_status_pb2.GetModelStatusRequest, data)
        name, version, label = _named(request.model_spec)
        if label:
            with self._store.lease(name, label=label) as servable:
                version = servable.version
        response = get_model_status_pb2.GetModelStatusResponse()
        for status in self._store.statuses(name, version):
            added = response.model_version_status.add(version=status.version, state=int(status.state))
            added.status.error_code = grpc.StatusCode[status.grpc_code].value[0]
            added.status.error_message = status.error
        call.model = name
        return _bytes(response)

    async def _reload(self, data: bytes, call: _Call) -> bytes:
        if self._admin is None:
            raise Forbidden("administration is off on this server.")
        self._admin.check(call.authorization)
        request = _parsed(model_management_pb2.ReloadConfigRequest, data)
        await self._in_pool(self._store.reload, model_configs(request.config))
        return _bytes(model_management_pb2.ReloadConfigResponse())

    # ---- our own service -----------------------------------------------------------------------------------------

    async def _recommend(self, data: bytes, call: _Call) -> bytes:
        request = await self._aside(call.size, lambda: _recommend_request(data, call.left_ms))
        self._about(call, request.model)
        answer = await self._recommending.recommend_soon(request, self._computed, self._in_pool)
        return _list_bytes(call, answer)

    async def _similar(self, data: bytes, call: _Call) -> bytes:
        given = _parsed(wire.SimilarRequest, data)
        self._about(call, given.model_name)
        request = SimilarRequest(
            item_id=given.item_id,
            k=given.k,
            model=given.model_name,
            version=given.version or None,
            label=given.version_label,
        )
        return _list_bytes(call, await self._in_pool(self._recommending.similar, request))

    def _about(self, call: _Call, name: str) -> None:
        """Counts a call, also one that fails, under the model that it names, or under the only one."""
        names = self._store.names()
        call.model = name if name in names else names[0] if not name and len(names) == 1 else ""

    async def _in_pool(self, function: Callable[[Any], Any], request: Any) -> Any:
        """What `function` answers, called in a thread."""
        if not self._places.acquire(blocking=False):
            raise Overloaded(
                f"the queue of recommendations is full: {self._settings.queue} requests wait; come back in 1 s.",
                retry_after=1.0,
            )
        try:
            future = self._pool.submit(function, request)
        except RuntimeError as error:  # no thread is left, or the door is closing
            self._places.release()
            raise Overloaded("the server has no thread for this call; come back in 1 s.", retry_after=1.0) from error
        future.add_done_callback(lambda _: self._places.release())
        return await self._completions.result(future)

    # ---- health --------------------------------------------------------------------------------------------------

    def _serving(self, service: str) -> int:
        if service and service not in SERVICES:
            return int(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        ready = self._store.ready and not self._stopping
        return int(health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _health(self, request: Any, context: Any) -> Any:
        status = self._serving(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "the server has no such service.")
        return health_pb2.HealthCheckResponse(status=status)

    async def _watch_health(self, request: Any, context: Any) -> None:
        told = None
        while True:
            if (status := self._serving(request.service)) != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            if self._stopping:  # or the stream would keep the server up for as long as stopping may take
                return
            await asyncio.sleep(WATCH_S)


_Reader = Callable[[Path, Signature], Callable[[Arrays], Message]]


@dataclass
class _Call:
    """One call under way.

    Attributes:
        context: gRPC's.
        deadline: `time.monotonic()` until which it must be answered.
        given: whether the deadline is the caller's own.
        model: the name of the model, once it is known to be one that is served.
        size: bytes of the request.
    """

    context: Any
    deadline: float
    given: bool
    model: str = ""
    size: int = 0

    @property
    def authorization(self) -> str | None:
        """The header of that name, None without one."""
        return next((value for key, value in self.context.invocation_metadata() or () if key == "authorization"), None)

    @property
    def late(self) -> bool:
        """Whether the caller's own deadline has passed, so that nobody waits; the server's own may be earlier."""
        return bool(self.context.time_remaining() == 0)

    @property
    def left_ms(self) -> float | None:
        """Milliseconds until the caller's deadline, None without one."""
        return max((self.deadline - time.monotonic()) * 1000, 1.0) if self.given else None


class _Completions:
    """Futures of worker threads as results on the event loop. However many are done at a moment, it is woken once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._done: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._woken = False

    async def result(self, future: Future[Any]) -> Any:
        """Waits for the future, and cancels it when nobody waits any more."""
        waiter: asyncio.Future[Any] = self._loop.create_future()
        future.add_done_callback(lambda done: self._finished(waiter, done))
        try:
            return await waiter
        except asyncio.CancelledError:
            future.cancel()
            raise

    def _finished(self, waiter: asyncio.Future[Any], done: Future[Any]) -> None:
        self._done.append((waiter, done))
        if not self._woken and not self._loop.is_closed():
            self._woken = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # first: what is appended from now on wakes the loop again
        while self._done:
            waiter, done = self._done.popleft()
            if waiter.done():
                continue
            if done.cancelled():
                waiter.cancel()
            elif (error := done.exception()) is not None:
                waiter.set_exception(error)
            else:
                waiter.set_result(done.result())


def _parsed(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"the message must be a {kind.DESCRIPTOR.name}; it cannot be parsed.") from error


def _bytes(message: Message) -> bytes:
    content: bytes = message.SerializeToString()
    return content


def _named(spec: Any) -> tuple[str, int | None, str]:
    """Name, version and label of a ModelSpec."""
    if not spec.name:
        raise InvalidRequest("ModelSpec has no name specified.")
    version = spec.version.value if spec.HasField("version") else None
    return spec.name, version, spec.version_label


def _answered_by(servable: Servable, signature: str) -> Any:
    spec = model_pb2.ModelSpec(name=servable.name, signature_name=signature)
    spec.version.value = servable.version
    return spec


def _inputs(given: Mapping[str, Any], specs: Signature) -> Arrays:
    """Tensors by name, with exactly the dtypes of the signature, as TensorFlow Serving wants it."""
    if given.keys() != specs.inputs.keys():
        extra, missing = sorted(set(given) - set(specs.inputs)), sorted(set(specs.inputs) - set(given))
        raise InvalidRequest(
            f"input size does not match signature: {len(given)}!={len(specs.inputs)}. Sent extra: "
            f"{{{','.join(name[:100] for name in extra[:10])}}}. Missing but required: {{{','.join(missing)}}}."
        )
    return {name: decode(name, given[name], spec.dtype) for name, spec in specs.inputs.items()}


def _outputs(wanted: Sequence[str], specs: Signature) -> Sequence[str]:
    for name in wanted:
        if name not in specs.outputs:
            raise InvalidRequest(
                f"output tensor alias not found in signature: {name[:100]} Outputs expected to be in the set "
                f"{{{','.join(sorted(specs.outputs))}}}."
            )
    if len(set(wanted)) != len(wanted):
        raise InvalidRequest("duplicate output tensor alias in the output_filter.")
    return wanted or list(specs.outputs)


def _size(outputs: Arrays) -> int:
    return sum(array.nbytes for array in outputs.values())


def _recommend_request(data: bytes, left_ms: float | None) -> RecommendRequest:
    given = _parsed(wire.RecommendRequest, data)
    filters: dict[str, tuple[str, ...]] = {}
    for entry in given.filters:
        filters[entry.column] = (*filters.get(entry.column, ()), *entry.values)
    return RecommendRequest(
        user_id=given.user_id,
        history=tuple(given.history),
        k=given.k,
        exclude=tuple(given.exclude),
        include=tuple(given.include),
        filters=filters,
        diversity=given.diversity,
        profile=given.profile or BEST,
        weights={weight.member: weight.factor for weight in given.weights},
        timeout_ms=left_ms,
        model=given.model_name,
        version=given.version or None,
        label=given.version_label,
    )


def _list_bytes(call: _Call, answer: ItemList) -> bytes:
    call.model = answer.model
    message = wire.ItemList(
        items=[
            {"item_id": item_id, "score": score, "contributions": contributions.values()}
            for item_id, score, contributions in answer.items
        ],
        model_name=answer.model,
        version=answer.version,
        profile=answer.profile,
        members_used=answer.members_used,
        fallback=answer.fallback,
        unknown_user=answer.unknown_user,
    )
    return _bytes(message)


def _ours(error: Exception) -> ServingError:
    if isinstance(error, ServingError):
        return error
    if isinstance(error, TimeoutError):
        return DeadlineExceeded("the deadline passed before the answer was there.")
    return ServingError(f"unexpected {type(error).__name__}: {error}")


async def _request(context: Any) -> bytes:
    """The one message that a call brings."""
    data: bytes = await context.read()
    if data is grpc.aio.EOF:
        raise InvalidRequest("a call must bring one message; received none.")
    return data


async def _refuse(method: str, error: ServingError, call: _Call) -> None:
    """Ends the call with the error's code. What went wrong inside is written to the log, not told."""
    sentence = str(error).partition("\n")[0][:1000]
    if error.grpc_code == ServingError.grpc_code:
        mark = secrets.token_hex(4)
        logger.error("%s: %s failed: %s", mark, method, error, exc_info=error)
        sentence = f"the server could not answer; its log says why under {mark}."
    trailing: tuple[tuple[str, str], ...] = ()
    if isinstance(error, Overloaded) and error.retry_after is not None:
        # The first is gRPC's own, which its retries obey; the second reads like HTTP's.
        pushback = str(round(error.retry_after * 1000))
        trailing = (("grpc-retry-pushback-ms", pushback), ("retry-after", f"{error.retry_after:g}"))
    if call.late:
        raise asyncio.CancelledError  # ends the call without a word
    await call.context.abort(grpc.StatusCode[error.grpc_code], sentence, trailing)
