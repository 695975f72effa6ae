"""What a remote server's refusal means. Knows the texts that object_store's errors are made of; repeats no secret.

An error of object_store carries, besides its message, a dump of the request: urls with signatures in them, headers. The
dump is cut off, and what is left of the message is reduced to the status, the server's own code and one line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kvist.errors import StoreError, StoreFull
from kvist.store.location import CREDENTIALS, Location

_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>([A-Za-z0-9]{1,80})</Code>")
_QUERY: Final = re.compile(r"\?[^\s()]*")
_ROLE: Final = re.compile(r"169\.254\.169\.254|169\.254\.170\.2|metadata\.google\.internal|InstanceMetadata")
_SECRET_NAME: Final = re.compile(r"(AWS|AZURE|GOOGLE).*(KEY|TOKEN|SECRET|SAS|CREDENTIALS)")
_PAST_END: Final = "Wanted range starting at"
"""What object_store says itself where a server, as Azure's, answers such a read with all there is."""
_FULL: Final = frozenset({"QuotaExceeded", "QuotaExceededException", "XMinioStorageFull", "InsufficientCapacity"})
_DENIED: Final = frozenset({401, 403})


@dataclass(frozen=True, slots=True)
class Refusal:
    """What can be told of a failed request.

    Attributes:
        status: HTTP's, or ``None`` if there was no answer.
        code: the server's word, such as ``NoSuchBucket``; empty if it gave none.
        message: one line without secrets.
        is_past_end: whether it is that a read began past the object's end.
        of_role: whether it is the machine's role that could not be asked, because no other credentials were found.
    """

    status: int | None
    code: str
    message: str
    is_past_end: bool
    of_role: bool

    @classmethod
    def read(cls, error: BaseException, environ: Mapping[str, str] = os.environ) -> Refusal:
        """Reduce an error of object_store to what may be shown."""
        text = str(error).partition("\n\nDebug source:")[0]
        status = _STATUS.search(text)
        code = _CODE.search(text)
        line = text.partition("status code: ")[0] if status else text
        line = line.removesuffix("Server returned non-2xx ").rstrip(" -")
        for name, value in environ.items():
            if len(value) >= 8 and _SECRET_NAME.match(name):
                line = line.replace(value, "***")
        line = " ".join(_QUERY.sub("", line).split())[:300]
        if status:
            line = " ".join(filter(None, (f"the server answered {status[1]}", code and code[1], f"({line})")))
        number = int(status[1]) if status else None
        is_past_end = number == 416 or _PAST_END in text
        return cls(number, code[1] if code else "", line, is_past_end, bool(_ROLE.search(text)))

    def error(self, act: str, location: Location) -> StoreError:
        """The typed error for ``act``, as in "cannot ``act`` in ..."."""
        where = f"cannot {act} in {location.url}"
        credentials = CREDENTIALS[location.scheme]
        if self.of_role:
            return StoreError(f"{where}: no credentials were found", hint=f"set {credentials}")
        if self.status in _DENIED:
            hint = f"check {credentials}, and what they allow there"
            return StoreError(f"{where}: access was refused: {self.message}", hint=hint)
        if self.status == 507 or self.code in _FULL:
            return StoreFull(f"{where}: {self.message}", hint="free space or raise the quota, or run kvist gc")
        if self.code == "NoSuchBucket" or self.code == "ContainerNotFound":
            return StoreError(f"{where}: there is no bucket {location.bucket}", hint="create it first: kvist does not")
        return StoreError(f"{where}: {self.message}")
