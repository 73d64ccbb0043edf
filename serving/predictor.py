"""Answers from one artifact: checked inputs in, numpy arrays out, errors only from `serving.errors`.

Every door (gRPC, REST, batch jobs, the command line) ends in `Predictor.run`, with inputs that `check` or
`serving.recommending` has checked, so that one request gets one answer. Knows nothing of training, of Keras or of the
models inside the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from fusion.export.manifest import EngineError, Manifest, Signature, verify_manifest
from serving.errors import ArtifactRefused, InvalidRequest, Overloaded, ServingError
from serving.graph import check_operations, read_graph
from serving.graph_session import GraphSession
from serving.inputs import Arrays as Arrays
from serving.inputs import check_inputs, first_items, recommend_inputs, signature_of
from serving.limits import Limits

ADD_ITEMS, WITHDRAW_ITEMS = "add_items", "withdraw_items"
CHANGING = (ADD_ITEMS, WITHDRAW_ITEMS)
"""Signatures that change the graph, one call at a time: for administrators, who do not come through the queue."""


class Predictor:
    """One loaded artifact.

    Attributes:
        manifest: what the artifact says about itself, verified.
        limits: how large a request may be.
        changes: how often the graph has been changed (`CHANGING`): what it answered before may not be so any more.
    """

    def __init__(self, graph: GraphSession, manifest: Manifest, limits: Limits) -> None:
        self.manifest = manifest
        self.limits = limits
        self.changes = 0
        self._graph = graph

    @classmethod
    def load(cls, artifact_folder: str | Path, limits: Limits | None = None, cores: int | None = None) -> Predictor:
        """Verifies the artifact's manifest and what its graph may do, and loads its SavedModel.

        The largest `k` is the smaller one of `limits.k` and the artifact's own `k_max`.

        Args:
            artifact_folder: of one version.
            limits: how large a request may be.
            cores: that one call of the graph may keep busy; None is all. The first artifact of a process decides.

        Raises ArtifactRefused.
        """
        limits = limits or Limits()
        try:
            manifest = verify_manifest(artifact_folder)
            check_operations(read_graph(Path(artifact_folder)))
            graph = GraphSession(Path(artifact_folder), cores)
        except EngineError as error:
            raise ArtifactRefused(str(error)) from error
        except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
            raise ArtifactRefused(f"{artifact_folder} must be a SavedModel; TensorFlow answered: {error}.") from error
        missing = set(manifest.signatures) - graph.signatures
        if missing:
            raise ArtifactRefused(f"{artifact_folder} must have its manifest's signatures; it lacks {sorted(missing)}.")
        k_max = min(limits.k, manifest.limits.get("k_max", limits.k))
        return cls(graph, manifest, dataclasses.replace(limits, k=k_max))

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the submodels, in the order of axis S of `contributions`."""
        return self.manifest.members

    def predict(self, signature: str, inputs: Mapping[str, Any]) -> Arrays:
        """Runs one signature.

        Args:
            signature: its name.
            inputs: every input of the signature, by name, as arrays or nested lists. Text may be str or bytes;
                whole numbers of any width are accepted where they fit.

        Returns the outputs by name; text as arrays of `bytes` objects.

        Raises:
            UnknownSignature: the artifact has no such signature.
            InvalidRequest: a name, dtype, shape or value does not fit; LimitExceeded when it is too large.
            Overloaded: no memory for it. ServingError: anything else.
        """
        return self.run(signature, self.check(signature, inputs))

    def check(self, signature: str, inputs: Mapping[str, Any]) -> Arrays:
        """The inputs as arrays of exactly the dtypes of the signature.

        Raises UnknownSignature, InvalidRequest and LimitExceeded as `predict` does.
        """
        return check_inputs(self.signature(signature).inputs, inputs, self.limits)

    def run(self, signature: str, arrays: Arrays) -> Arrays:
        """Runs one signature on arrays that `check` returned, or on rows of several of them put together.

        Raises InvalidRequest, Overloaded and ServingError as `predict` does.
        """
        try:
            return self._graph.run(signature, arrays)
        except tf.errors.InvalidArgumentError as error:
            reason = error.message.removeprefix("Graph execution error:").strip().partition("\n")[0]
            raise InvalidRequest(f"'{signature}' cannot answer these inputs: {reason}.") from error
        except (tf.errors.ResourceExhaustedError, MemoryError) as error:
            raise Overloaded("the request needs more memory than is free; send fewer rows, or try again.") from error
        except (tf.errors.OpError, ValueError, TypeError, LookupError, RuntimeError) as error:
            raise ServingError(f"'{signature}' failed: {error}") from error
        finally:
            if signature in CHANGING:
                self.changes += 1

    def signature(self, name: str) -> Signature:
        """The inputs and outputs of a signature. Raises UnknownSignature."""
        return signature_of(self.manifest, name)

    def recommend(
        self,
        user_ids: Sequence[str] | None = None,
        histories: Sequence[Sequence[str]] | None = None,
        k: int = 10,
        exclude: Sequence[Sequence[str]] | None = None,
        include: Sequence[Sequence[str]] | None = None,
    ) -> Arrays:
        """The k best items for users, by their id, by a history of item ids, or both: a history is added to what is
        stored of a known user.

        Args:
            user_ids: B ids.
            histories: B lists of item ids.
            k: items per user.
            exclude: B lists of items that must not be returned.
            include: B lists of the only items that may be returned; an empty list allows all.

        Returns `item_ids` `[B, k]` bytes (`b''` beyond the last), `scores` float32 `[B, k]`, `contributions`
        float32 `[B, S, k]` that sum to the scores up to the ensemble's bias, `known_user` bool `[B]`.
        """
        asked = recommend_inputs(user_ids, histories, k, exclude, include, self.limits)
        return first_items(self.predict("recommend", asked), k)

    def similar_items(self, item_ids: Sequence[str], k: int = 10) -> Arrays:
        """The k items most like each of B items, and never the item itself; an unknown item is like nothing.

        Returns `item_ids` `[B, k]` bytes (`b''` beyond the last), `scores` float32 `[B, k]`, `contributions` float32
        `[B, S, k]`.
        """
        asked = {"item_id": list(item_ids), "k": np.full(len(item_ids), k, np.int64)}
        return first_items(self.predict("similar_items", asked), k)

    def search(self, name: str, inputs: Mapping[str, Any], k: int = 10) -> Arrays:
        """The k items nearest to B examples by the cosine of the embeddings of `name` (a member that reads content).

        Args:
            name: the signature is `search_<name>`; UnknownSignature when the artifact has none.
            inputs: the examples as the encoder's inputs, without `k` (`recsys.examples` makes them of text or images).
            k: items per example.

        Returns `item_ids` `[B, k]` bytes (`b''` beyond the last) and `scores` float32 `[B, k]`, the cosines.
        """
        rows = len(next(iter(inputs.values()), ()))
        return first_items(self.predict(f"search_{name}", {**inputs, "k": np.full(rows, k, np.int64)}), k)
