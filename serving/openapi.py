"""Every call of the REST door in one table: the routes, the OpenAPI document and its examples are made from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

VERSIONS = ("", "/versions/{version}", "/labels/{label}")
"""How a path of TensorFlow Serving names a version: not at all (the newest), by number, by label."""
MODEL = "/v1/models/{model}"


@dataclass(frozen=True)
class Operation:
    """One call.

    Attributes:
        method: GET or POST.
        path: with the parameters in braces.
        name: of the method that answers (`serving.rest_server`), and the start of the `operationId`.
        summary: what it does, one line.
        example: a body, where the method is POST; it answers on a server of the films of `tests/fake_serving.py`.
        query: parameters after the question mark, with what they are.
        admin: whether it belongs to the door of administration.
        open: whether it needs no token.
        kind: media type of the answer.
    """

    method: str
    path: str
    name: str
    summary: str
    example: Any = None
    query: Mapping[str, str] = field(default_factory=dict)
    admin: bool = False
    open: bool = False
    kind: str = "application/json"

    @property
    def parameters(self) -> list[str]:
        """Names in braces."""
        return re.findall(r"{(\w+)}", self.path)


def _each(method: str, tail: str, name: str, summary: str, example: Any = None) -> list[Operation]:
    return [Operation(method, MODEL + where + tail, name, summary, example) for where in VERSIONS]


ONE_MODEL = {"model": "name of the model; not needed where there is one"}
PROMETHEUS = "text/plain"
OPERATIONS: Sequence[Operation] = (
    Operation(
        "POST",
        "/v1/recommend",
        "recommend",
        "The k best items for a user, a history, or both.",
        {"user_id": "u0", "history": ["i2"], "k": 3, "filters": {"language": ["en", "fr"]}, "weights": {"text": 1.5}},
    ),
    Operation("POST", "/v1/similar", "similar", "The k items most like one item.", {"item_id": "i2", "k": 3}),
    Operation(
        "POST",
        "/v1/feedback",
        "feedback",
        "What users did with what they were shown, for the next training.",
        {"events": [{"user_id": "u0", "item_id": "i2", "event": "taken"}]},
    ),
    *_each("GET", "", "status", "Which versions of a model there are, and their states."),
    *_each("GET", "/metadata", "metadata", "The signatures of a version."),
    *_each(
        "POST",
        ":predict",
        "predict",
        "Runs a signature on rows (`instances`) or columns (`inputs`).",
        {"signature_name": "serving_default", "instances": [{"history": ["i0"], "candidates": ["i1", "i2"]}]},
    ),
    *_each(
        "POST",
        ":classify",
        "classify",
        "The classes of examples, with their probabilities.",
        {"signature_name": "odds", "examples": [{"x": [1.0, 2.0]}]},
    ),
    *_each(
        "POST",
        ":regress",
        "regress",
        "One number for each example.",
        {"signature_name": "sum", "examples": [{"x": [1.0, 2.0]}]},
    ),
    Operation(
        "GET", "/v1/catalogue", "catalogue", "What may be asked: members, filters, profiles, figures.", None, ONE_MODEL
    ),
    Operation(
        "GET",
        "/v1/items",
        "items",
        "What the catalogue says of items: those named, or whose title or id contains a text.",
        None,
        {**ONE_MODEL, "id": "of an item; may be repeated", "search": "the text", "limit": "how many, at most 50"},
    ),
    Operation("GET", "/v1/items/{item_id}/image", "image", "The picture of an item.", None, ONE_MODEL, kind="image/*"),
    Operation("GET", "/v1/report", "report", "The page of a model's run.", None, ONE_MODEL, kind="text/html"),
    Operation("GET", "/healthz", "healthz", "Whether the process answers.", open=True),
    Operation("GET", "/readyz", "readyz", "Whether every model has a version that is loaded and warm.", open=True),
    Operation(
        "GET",
        "/monitoring/prometheus/metrics",
        "prometheus",
        "Numbers in the format of Prometheus.",
        kind=PROMETHEUS,
    ),
    Operation("GET", "/openapi.json", "openapi", "This document."),
    Operation("GET", "/v1/admin/openapi.json", "openapi", "This document.", admin=True),
    Operation("GET", "/v1/admin/models", "list_models", "Models, versions, labels, and members left out.", admin=True),
    Operation(
        "POST",
        "/v1/admin/rollback",
        "rollback",
        "Leaves a version, the newest one where none is named, for the one before; answers which one is served then.",
        {"model": "films", "version": 2},
        admin=True,
    ),
    Operation(
        "POST",
        "/v1/admin/labels",
        "assign_label",
        "Gives a label to a version.",
        {"model": "films", "label": "stable", "version": 1},
        admin=True,
    ),
    Operation(
        "POST",
        "/v1/admin/reload",
        "reload",
        "Serves exactly these models from now on.",
        {"models": [{"name": "films", "folder": "/models/films", "labels": {"stable": 1}, "canary": 0.0}]},
        admin=True,
    ),
    Operation(
        "POST",
        "/v1/admin/members",
        "members",
        "Takes a member out of a model's answers, or puts it back.",
        {"model": "films", "member": "text", "use": True},
        admin=True,
    ),
    Operation(
        "GET", "/v1/admin/items", "list_items", "New and withdrawn items, by version.", None, ONE_MODEL, admin=True
    ),
    Operation(
        "POST",
        "/v1/admin/items",
        "add_items",
        "Adds items by their texts and images (base64), without training.",
        {"model": "films", "items": [{"item_id": "new", "title": "Nine", "text": "a word", "image": "iVBORw0KGgo="}]},
        admin=True,
    ),
    Operation(
        "POST",
        "/v1/admin/items/withdraw",
        "withdraw_items",
        "Takes items, new ones or others, out of all lists.",
        {"model": "films", "item_ids": ["new", "i2"]},
        admin=True,
    ),
    Operation(
        "POST",
        "/v1/admin/items/restore",
        "restore_items",
        "Puts items back that were withdrawn.",
        {"model": "films", "item_ids": ["i2"]},
        admin=True,
    ),
)

ERRORS = {
    "400": "The request is not as it must be; the sentence says what and where.",
    "401": "No token, or one that has expired.",
    "403": "Not by this name, not from this page, or not at this door.",
    "404": "No such model, version, item or path.",
    "408": "The request did not come in time.",
    "409": "The server is not in a state for this, or the item is there already.",
    "413": "The body is too large.",
    "429": "Overloaded; `Retry-After` says when to come back.",
    "500": "A fault of the server, whose log says what.",
    "503": "Not now: stopping, or without a version that is loaded.",
    "504": "The answer was not there in time.",
    "507": "The disk refuses; what was sent was not kept.",
}


def document(title: str, version: str, operations: Sequence[Operation]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a door that has these operations."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "security": [{"token": []}],
        "components": {
            "schemas": {"Error": error},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _described(operation: Operation) -> dict[str, Any]:
    tail = "".join(f"_{name}" for name in operation.parameters if name in ("version", "label"))
    schema = {"schema": {"$ref": "#/components/schemas/Error"}}
    answers = {code: {"description": text, "content": {"application/json": schema}} for code, text in ERRORS.items()}
    described: dict[str, Any] = {
        "operationId": operation.name + tail,
        "summary": operation.summary,
        "parameters": [
            *({"name": n, "in": "path", "required": True, "schema": _schema(n)} for n in operation.parameters),
            *(
                {"name": n, "in": "query", "description": text, "schema": {"type": "string"}}
                for n, text in operation.query.items()
            ),
        ],
        "responses": {"200": {"description": "The answer.", "content": {operation.kind: {}}}, **answers},
    }
    if operation.open:
        described["security"] = []
    if operation.example is not None:
        content = {"schema": {"type": "object"}, "example": operation.example}
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    return described


def _schema(parameter: str) -> dict[str, str]:
    return {"type": "integer", "format": "int64"} if parameter == "version" else {"type": "string"}
