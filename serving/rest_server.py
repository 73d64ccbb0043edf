"""The REST door: TensorFlow Serving's v1 API, `/v1/recommend`, a page, and what those who watch a server ask.

`app` answers users and `admin_app` administers: two apps for two ports, and the second is off unless an operator gives
it a file of tokens. Both are run with `serving.rest_guard.uvicorn_config`, which holds the bounds of the protocol.

Errors are `{"error": "one sentence"}` with the HTTP status of `serving.errors`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fusion.export.manifest import Signature
from serving.catalogue import IMAGE, Catalogue
from serving.errors import (
    InvalidRequest,
    NotPossible,
    ServingError,
    UnknownItem,
    UnknownLabel,
    UnknownModel,
    unknown,
)
from serving.feedback import FeedbackLog, parse_events
from serving.inputs import Arrays, signature_of
from serving.json_examples import CONTEXT, EXAMPLES, classes, input_of, values
from serving.json_fields import MODEL_CONFIG, RECOMMEND, SIMILAR, checked, objects, required, text, texts, truth, whole
from serving.json_limits import inflate, parse
from serving.json_tensors import INPUTS, INSTANCES, inputs_of
from serving.json_tensors import answer as tensors_answer
from serving.messages import BEST, PROFILES, ItemList, RecommendRequest, SimilarRequest
from serving.metrics import CONTENT_TYPE, METRICS
from serving.model_store import ModelConfig, ModelStore, Servable, VersionStatus
from serving.new_items import NewItems
from serving.openapi import OPERATIONS, Operation, document
from serving.recommending import SIGNATURES, Recommending
from serving.rest_guard import OPERATION, Bodies, Guard, RestSettings, Workers, json_response
from serving.security import Tokens
from serving.tf_examples import example_inputs

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}
REPORT = "report.html"
"""The page of the run that an artifact was made by, among its files."""
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
"""It has its styles and pictures within, and no script."""
PAGE_CALLS = ("catalogue", "items", "image", "report")
"""Only the page asks these."""
SERVING_DEFAULT = "serving_default"
SHOWN_USERS = 50
"""Users that the page offers to choose from."""
MOST_ITEMS = 50
AT_ONCE = ("healthz", "readyz", "openapi", "prometheus")
"""Answered without a thread: these must be heard when all threads are taken."""
LOADING, LOADING_S = ("rollback", "reload"), 600.0
"""Calls that may load models, and the time that they have at least."""
IMAGES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
"""Media type by the first bytes; nothing else is sent as an image."""


@dataclass(frozen=True)
class Call:
    """One request as the methods below see it.

    Attributes:
        path: the parameters of the path; a version is a number already.
        query: those after the question mark.
        body: the JSON value, None where there is none.
        arrived, deadline: `time.monotonic()` when it had come, and until which the answer is waited for.
    """

    path: Mapping[str, Any]
    query: QueryParams
    body: Any
    arrived: float
    deadline: float

    @property
    def where(self) -> dict[str, Any]:
        """Arguments of `ModelStore.lease`."""
        return {"name": self.model, "version": self.path.get("version"), "label": self.path.get("label", "")}

    @property
    def model(self) -> str:
        """The model that is meant, '' for the only one."""
        named = self.body.get("model", "") if isinstance(self.body, dict) else ""
        return str(self.path.get("model") or self.query.get("model") or named)


class Rest:
    """The answers of the door for users: one method for each operation of `serving.openapi`.

    Each returns a JSON value or a Response, and raises ServingError.
    """

    def __init__(self, store: ModelStore, recommending: Recommending, log: FeedbackLog | None) -> None:
        self.store, self.recommending, self.log = store, recommending, log
        self.document: dict[str, Any] = {}

    # ---- recommendations -------------------------------------------------------------------------------------

    def recommend(self, call: Call) -> Any:
        request = RecommendRequest(**checked(call.body, RECOMMEND))
        return self._list(self.recommending.recommend(request, call.arrived, call.deadline))

    def similar(self, call: Call) -> Any:
        fields = checked(call.body, SIMILAR)
        if "item_id" not in fields:
            raise InvalidRequest("a body must name an item: 'item_id' is missing.")
        return self._list(self.recommending.similar(SimilarRequest(**fields)))

    def _list(self, answer: ItemList) -> dict[str, Any]:
        items = [
            {**item._asdict(), **({"title": title} if title else {})}
            for item, title in zip(answer.items, self.recommending.titles(answer), strict=True)
        ]
        return {**{name: getattr(answer, name) for name in ItemList.__dataclass_fields__}, "items": items}

    def feedback(self, call: Call) -> Any:
        assert self.log is not None  # or there is no such path
        return {"kept": self.log.append(parse_events(call.body))}

    def catalogue(self, call: Call) -> Any:
        """What the page offers."""
        with self.store.lease(**self._shown(call)) as servable:
            found, manifest = self.recommending.catalogue(servable), servable.predictor.manifest
            profiles = [profile for profile in PROFILES if SIGNATURES[profile] in manifest.signatures]
            figures = {name: value for name, value in manifest.metrics.items() if isinstance(value, int | float)}
            return {
                "models": self._recommenders(),
                "model": servable.name,
                "version": servable.version,
                "members": list(manifest.members),
                "k_max": servable.predictor.limits.k,
                "profiles": profiles,
                "diversity": found.has_vectors,
                "filters": found.choices,
                "items": found.count,
                "users": found.user_ids[:SHOWN_USERS],
                "user_count": len(found.user_ids),
                "figures": figures,
                "report": REPORT in manifest.files,
            }

    def report(self, call: Call) -> Any:
        with self.store.lease(**self._shown(call)) as servable:
            if REPORT not in servable.predictor.manifest.files:
                raise UnknownItem("the artifact has no report of its run.")
            content = (servable.folder / REPORT).read_bytes()
        return Response(content, media_type="text/html", headers={"content-security-policy": REPORT_POLICY})

    def items(self, call: Call) -> Any:
        wanted, limit = call.query.getlist("id")[:MOST_ITEMS], call.query.get("limit", "10")
        if not limit.isdecimal() or not 1 <= int(limit[:9]) <= MOST_ITEMS:
            raise InvalidRequest(f"'limit' must be between 1 and {MOST_ITEMS}; received '{limit[:20]}'.")
        with self.store.lease(**self._shown(call)) as servable:
            found = self.recommending.catalogue(servable)
            ids = wanted or found.search(call.query.get("search", "")[:200], int(limit))
            return {"items": [{"item_id": item, **found.described(item)} for item in ids if found.offers(item)]}

    def image(self, call: Call) -> Any:
        with self.store.lease(**self._shown(call)) as servable:
            found = self.recommending.catalogue(servable)
            brought = found.picture(call.path["item_id"])
            content = brought or _image(found, servable.predictor.manifest.files, call)
        kind = next((kind for head, kind in IMAGES.items() if content.startswith(head)), None)
        if kind is None:
            raise UnknownItem(f"the item '{call.path['item_id'][:100]}' has no picture that a page could show.")
        seconds = 3600 if brought is None else 60  # a new item may be withdrawn, and come again with another picture
        return Response(content, media_type=kind, headers={"cache-control": f"private, max-age={seconds}"})

    def _shown(self, call: Call) -> dict[str, Any]:
        """The model that a page is about: the one it names, or the first that recommends."""
        return {**call.where, "name": call.model or next(iter(self._recommenders()), "")}

    def _recommenders(self) -> list[str]:
        found = []
        for name in self.store.names():
            with contextlib.suppress(UnknownModel), self.store.lease(name) as servable:
                if SIGNATURES[BEST] in servable.predictor.manifest.signatures:
                    found.append(name)
        return found

    # ---- TensorFlow Serving ----------------------------------------------------------------------------------

    def status(self, call: Call) -> Any:
        version = call.path.get("version")
        if label := call.path.get("label"):
            version = self.store.labels(call.model).get(label)
            if version is None:
                raise UnknownLabel(f"Unrecognized servable version label: {label[:100]}")
        return {"model_version_status": [_state(status) for status in self.store.statuses(call.model, version)]}

    def metadata(self, call: Call) -> Any:
        with self.store.lease(**call.where) as servable:
            signatures = {
                name: {
                    "inputs": {key: _tensor_info(name, key, spec) for key, spec in signature.inputs.items()},
                    "outputs": {key: _tensor_info(name, key, spec) for key, spec in signature.outputs.items()},
                    "method_name": "tensorflow/serving/predict",
                }
                for name, signature in servable.predictor.manifest.signatures.items()
            }
            spec = {"name": servable.name, "signature_name": "", "version": str(servable.version)}
            return {"model_spec": spec, "metadata": {"signature_def": {"signature_def": signatures}}}

    def predict(self, call: Call) -> Any:
        with self._asked(call, INSTANCES, INPUTS) as (servable, name, signature):
            inputs, rows = inputs_of(call.body, signature)
            outputs = servable.call(name, inputs, call.deadline)
            return tensors_answer(outputs, rows, len(next(iter(inputs.values()), ())))

    def classify(self, call: Call) -> Any:
        return self._inferred(call, classes)

    def regress(self, call: Call) -> Any:
        return self._inferred(call, values)

    def _inferred(self, call: Call, result: Callable[[Path, Signature], Callable[[Arrays], Any]]) -> Any:
        with self._asked(call, EXAMPLES, CONTEXT) as (servable, name, signature):
            made = result(servable.folder, signature)
            inputs = example_inputs(input_of(call.body, signature), signature, servable.predictor.limits)
            return {"result": made(servable.call(name, inputs, call.deadline))}

    @contextlib.contextmanager
    def _asked(self, call: Call, *fields: str) -> Iterator[tuple[Servable, str, Signature]]:
        """The version and the signature that a body asks; it may have no fields but these and `signature_name`."""
        known = ("signature_name", *fields)
        if not isinstance(call.body, dict):
            raise InvalidRequest(f"a body must be an object with {', '.join(known)}.")
        if extra := set(call.body).difference(known):
            raise InvalidRequest(f"a body has no such field; {unknown(min(extra), known)}.")
        name = call.body.get("signature_name") or SERVING_DEFAULT
        with self.store.lease(**call.where) as servable:
            yield servable, str(name), signature_of(servable.predictor.manifest, str(name))

    # ---- for those who watch ---------------------------------------------------------------------------------

    def healthz(self, call: Call) -> Any:
        return {"status": "alive"}

    def readyz(self, call: Call) -> Any:
        models = {name: _versions(self.store.statuses(name)) for name in self.store.names()}
        ready = self.store.ready
        return json_response({"status": "ready" if ready else "not ready", "models": models}, 200 if ready else 503)

    def prometheus(self, call: Call) -> Any:
        return Response(METRICS.text(), media_type=CONTENT_TYPE)

    def openapi(self, call: Call) -> Any:
        return self.document


class Admin:
    """The answers of the door for administration."""

    def __init__(self, store: ModelStore, new_items: NewItems | None) -> None:
        self.store, self.new_items = store, new_items
        self.document: dict[str, Any] = {}

    def openapi(self, call: Call) -> Any:
        return self.document

    def list_models(self, call: Call) -> Any:
        return {
            "models": {
                name: {
                    "versions": _versions(self.store.statuses(name)),
                    "labels": self.store.labels(name),
                    "dropped": sorted(self.store.dropped(name)),
                }
                for name in self.store.names()
            }
        }

    def rollback(self, call: Call) -> Any:
        fields = checked(call.body, {"model": text, "version": whole})
        return {"version": self.store.rollback(fields.get("model", ""), fields.get("version"))}

    def assign_label(self, call: Call) -> Any:
        fields = required(checked(call.body, {"model": text, "label": text, "version": whole}), "label", "version")
        self.store.assign_label(fields.get("model", ""), fields["label"], fields["version"])
        return {"labels": self.store.labels(fields.get("model", ""))}

    def reload(self, call: Call) -> Any:
        models = required(checked(call.body, {"models": objects}), "models")["models"]
        configs = [required(checked(model, MODEL_CONFIG), "name", "folder") for model in models]
        self.store.reload([ModelConfig(**{**config, "folder": Path(config["folder"])}) for config in configs])
        return self.list_models(call)

    def members(self, call: Call) -> Any:
        fields = required(checked(call.body, {"model": text, "member": text, "use": truth}), "member", "use")
        change = self.store.restore_member if fields["use"] else self.store.drop_member
        change(fields.get("model", ""), fields["member"])
        return fields

    def list_items(self, call: Call) -> Any:
        return self._items().listed(call.model)

    def add_items(self, call: Call) -> Any:
        fields = required(checked(call.body, {"model": text, "items": objects}), "items")
        return self._items().add(fields.get("model", ""), fields["items"])

    def withdraw_items(self, call: Call) -> Any:
        fields = required(checked(call.body, {"model": text, "item_ids": texts}), "item_ids")
        return self._items().withdraw(fields.get("model", ""), fields["item_ids"])

    def restore_items(self, call: Call) -> Any:
        fields = required(checked(call.body, {"model": text, "item_ids": texts}), "item_ids")
        return self._items().restore(fields.get("model", ""), fields["item_ids"])

    def _items(self) -> NewItems:
        if self.new_items is None:
            raise NotPossible("this server has no journal of new items; start it with --items-journal FOLDER.")
        return self.new_items


# ---- TensorFlow Serving's forms ------------------------------------------------------------------------------


def _state(status: VersionStatus) -> dict[str, Any]:
    error = {"error_code": status.grpc_code, "error_message": status.error}
    return {"version": str(status.version), "state": status.state.name, "status": error}


def _versions(statuses: list[VersionStatus]) -> dict[str, Any]:
    return {str(s.version): {"state": s.state.name, "warmed": s.warmed, "error": s.error} for s in statuses}


def _tensor_info(signature: str, name: str, spec: Any) -> dict[str, Any]:
    dims = [{"size": str(-1 if size is None else size), "name": ""} for size in spec.shape]
    kind = {"float32": "DT_FLOAT", "float64": "DT_DOUBLE"}.get(spec.dtype, f"DT_{spec.dtype.upper()}")
    return {
        "dtype": kind,
        "tensor_shape": {"dim": dims, "unknown_rank": False},
        "name": f"{signature}_{name}:0",
    }


def _image(found: Catalogue, files: Mapping[str, Any], call: Call) -> bytes:
    """The bytes of an item's picture, which must be a file of the manifest: nothing else of the disk is read."""
    path = found.described(call.path["item_id"]).get(IMAGE)
    if not isinstance(path, str) or path not in files:
        raise UnknownItem(f"the artifact has no picture of the item '{call.path['item_id'][:100]}'.")
    return (found.folder / path).read_bytes()


class _ModelName(Convertor[str]):
    """A model's name in a path ends at the colon before `predict`."""

    regex = "[^/:]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("model", _ModelName())


# ---- the apps ------------------------------------------------------------------------------------------------


def app(
    store: ModelStore,
    recommending: Recommending,
    settings: RestSettings | None = None,
    tokens: Tokens | None = None,
    page: bool = True,
    feedback: FeedbackLog | None = None,
) -> Starlette:
    """The door for users.

    Args:
        store: the models.
        recommending: answers `/v1/recommend` and `/v1/similar`.
        settings: the bounds.
        tokens: who may ask; None lets everybody in.
        page: whether `/` is a page, which lists users and items to choose from.
        feedback: where `/v1/feedback` writes; None has no such path.
    """
    operations = [operation for operation in OPERATIONS if not operation.admin]
    if not page:
        operations = [o for o in operations if o.name not in PAGE_CALLS]
    if feedback is None:
        operations = [o for o in operations if o.name != "feedback"]
    files = [_file(path, *file) for path, file in PAGE_FILES.items()] if page else []
    answers = Rest(store, recommending, feedback)
    answers.document = document("Recommendations, and the REST API of TensorFlow Serving", "1", operations)
    return _starlette(answers, operations, files, store, settings or RestSettings(), tokens)


def admin_app(
    store: ModelStore,
    tokens: Tokens,
    settings: RestSettings | None = None,
    new_items: NewItems | None = None,
) -> Starlette:
    """The door for administration; it never lets anybody in without a token. Labels, rollback, reload, members, and
    where a server keeps a journal of them new items and those that are withdrawn."""
    operations = [operation for operation in OPERATIONS if operation.admin]
    answers = Admin(store, new_items)
    answers.document = document("Administration of a server of recommendations", "1", operations)
    return _starlette(answers, operations, [], store, settings or RestSettings(), tokens)


def _starlette(
    answers: Any,
    operations: list[Operation],
    files: list[Route],
    store: ModelStore,
    settings: RestSettings,
    tokens: Tokens | None,
) -> Starlette:
    workers, bodies = Workers(settings.threads, settings.waiting), Bodies(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        workers.close()

    routes = [
        Route(
            operation.path.replace("{version}", "{version:int}").replace("{model}", "{model:model}"),
            _endpoint(operation, getattr(answers, operation.name), store, settings, workers, bodies),
            methods=[operation.method],
        )
        for operation in operations
    ]
    found = Starlette(routes=[*routes, *files], lifespan=lifespan, exception_handlers={HTTPException: _no_such_call})
    open_paths = {operation.path for operation in operations if operation.open} | {route.path for route in files}
    found.add_middleware(Guard, tokens=tokens, open_paths=frozenset(open_paths), hosts=settings.hosts)
    return found


def _endpoint(
    operation: Operation,
    answer: Callable[[Call], Any],
    store: ModelStore,
    settings: RestSettings,
    workers: Workers,
    bodies: Bodies,
) -> Callable[[Request], Awaitable[Response]]:
    seconds = max(settings.seconds, LOADING_S) if operation.name in LOADING else settings.seconds

    def heard(request: Request, body: Any, arrived: float) -> Call:
        return Call(request.path_params, request.query_params, body, arrived, arrived + seconds)

    def work(request: Request, body: bytes, arrived: float) -> Response:
        started, status, call = time.perf_counter(), "OK", heard(request, None, arrived)
        try:
            if operation.method == "POST":
                encoding = request.headers.get("content-encoding", "").strip().lower()
                plain = inflate(body, encoding, settings.inflated_bytes, settings.ratio)
                call = heard(request, parse(plain, settings.depth, settings.values), arrived)
            found = answer(call)
            return found if isinstance(found, Response) else json_response(found)
        except ServingError as error:
            status = error.grpc_code
            raise
        except Exception:
            status = ServingError.grpc_code
            raise
        finally:
            name = operation.name.capitalize()
            METRICS.request(_served(store, call.model), name, "REST", status, time.perf_counter() - started)

    async def endpoint(request: Request) -> Response:
        request.scope[OPERATION] = operation.name
        if operation.name in AT_ONCE:
            found = answer(heard(request, None, time.monotonic()))
            return found if isinstance(found, Response) else json_response(found)
        body = await bodies.read(request)
        try:
            return await workers.run(partial(work, request, body, time.monotonic()), seconds)
        finally:
            bodies.release(len(body))

    return endpoint


def _served(store: ModelStore, name: str) -> str:
    """The model's name for metrics: only what is served, so that nobody makes new series."""
    names = store.names()
    return name if name in names else names[0] if not name and len(names) == 1 else ""


def _file(path: str, name: str, kind: str) -> Route:
    content = (PAGE / name).read_bytes()

    async def endpoint(_: Request) -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers={"cache-control": "no-cache"})

    return Route(path, endpoint, methods=["GET"])


async def _no_such_call(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in TensorFlow Serving's words."""
    assert isinstance(error, HTTPException)
    sentence = f"Malformed request: {request.method} {request.url.path[:200]}"
    return json_response({"error": sentence}, error.status_code, error.headers)
