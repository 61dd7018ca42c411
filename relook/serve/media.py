"""Where the bytes of an image come from: data URLs, and only where the server allows it, the web and a folder.

A client chooses the URL, so it must not lead into the server's own network or beyond the folder: a name is looked up
once, every address of it must be public, the connection goes to that very address, and each redirect is checked alike.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urljoin, urlsplit

from relook.errors import DataError
from relook.files import make_paths

DATA_URL = re.compile(r"data:[\w.+/;=-]*;base64,", re.ASCII | re.IGNORECASE)
# base64's alphabet for URLs, and the spaces and line breaks of mail and of `base64` on the command line.
URL_SAFE, BLANKS = bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f"
NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/]")
REDIRECTS = 3
CHUNK = 1 << 16
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class ImageSources:
    """What images a server takes.

    Args:
        max_bytes: of an image file.
        web: whether http and https URLs are followed.
        root: the folder below which file URLs may lie; None for no files.
        seconds: for a download, from its first lookup to its last byte.
    """

    max_bytes: int = 20_000_000
    web: bool = False
    root: Path | None = None
    seconds: float = 10.0

    def __post_init__(self) -> None:
        make_paths(self)

    def read(self, url: str) -> bytes:
        """The bytes that a URL leads to.

        Raises:
            DataError: it is not allowed, too large, or leads to nothing. The reason says nothing of the server.
        """
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return self._data(url)
        if scheme in ("http", "https") and self.web:
            return self._download(url)
        if scheme == "file" and self.root is not None:
            return self._file(url, self.root)
        raise DataError("This server does not take images from such a URL.", f"Send {self._taken()}.")

    def _taken(self) -> str:
        taken = ["a data: URL with the image in base64"]
        taken += ["an http or https URL"] * self.web + ["a file: URL below its media root"] * (self.root is not None)
        return " or ".join(taken)

    def _sized(self, data: bytes) -> bytes:
        self._check_size(len(data))
        return data

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            raise DataError(f"The image has more than {self.max_bytes:,} bytes.", "Scale it down.")

    def _data(self, url: str) -> bytes:
        """Decode base64 as browsers do: with line breaks, escapes (%2B), or without its padding."""
        head = DATA_URL.match(url, 0, 200)
        if head is None:
            raise DataError("The data: URL does not say that it is base64.", "Write data:image/png;base64,...")
        encoded = url[head.end() :].encode(errors="replace")
        if b"%" in encoded:
            encoded = unquote_to_bytes(encoded)
        encoded = encoded.translate(URL_SAFE, BLANKS).rstrip(b"=")
        if len(encoded) > self.max_bytes * 4 // 3 + 4:
            raise DataError(f"The image has more than {self.max_bytes:,} bytes.", "Scale it down.")
        if NOT_BASE64.search(encoded):
            raise DataError("The data: URL has a character that base64 does not have.", "Encode the image again.")
        if len(encoded) % 4 == 1:
            raise DataError("The base64 of the data: URL is cut off.", "Send all of it.")
        return self._sized(base64.b64decode(encoded + b"=" * (-len(encoded) % 4)))

    def _file(self, url: str, root: Path) -> bytes:
        """A file below the root, whatever links or dots its path has."""
        parts = urlsplit(url)
        try:
            path = Path(unquote(parts.path, errors="strict")).resolve(strict=True)
            if parts.netloc in ("", "localhost") and path.is_relative_to(root.resolve()) and path.is_file():
                with path.open("rb") as file:
                    return self._sized(file.read(self.max_bytes + 1))
        except (OSError, ValueError, RuntimeError):  # nothing there, a NUL byte, links in a circle
            pass
        raise DataError("There is no such file below the media root.", "Give file:///PATH of a file in it.")

    def _download(self, url: str) -> bytes:
        until = time.monotonic() + self.seconds
        try:
            for _ in range(REDIRECTS + 1):
                with _Connection(url, until) as connection:
                    answer = connection.ask()
                    place = answer.headers.get("Location")
                    if answer.status in (301, 302, 303, 307, 308) and place:
                        url = urljoin(url, place)
                        continue
                    if answer.status != 200:
                        raise DataError(f"The image's server answered {answer.status}.", "Check the URL.")
                    return self._body(answer, until)
        except (OSError, ValueError, http.client.HTTPException):
            raise DataError("The image could not be fetched.", "Check the URL.") from None
        raise DataError("The image's URL redirects too often.", "Give the URL that it ends at.")

    def _body(self, answer: http.client.HTTPResponse, until: float) -> bytes:
        data = bytearray()
        while chunk := answer.read1(CHUNK):
            data += chunk
            self._check_size(len(data))
        if time.monotonic() > until:  # it was cut, which looks like its end
            raise TimeoutError
        return bytes(data)


class _Connection:
    """One request to an address that was looked up once and found public, cut when its time is over: a socket's own
    timeout begins again with each byte."""

    def __init__(self, url: str, until: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DataError("The image's URL leads to no web server.", "Give an http or https URL.")
        self.host, secure = parts.hostname, parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        self.path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        left = max(0.1, until - time.monotonic())
        address = public_address(self.host, port)
        self.http = http.client.HTTPConnection(self.host, port, timeout=left)
        plain = socket.create_connection((address, port), timeout=left)
        # The name is checked against the certificate, though the connection goes to the address.
        self.socket = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host) if secure else plain
        self.http.sock = self.socket
        self.cut = threading.Timer(until - time.monotonic(), self._cut)
        self.cut.start()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):  # it is closed already
            self.socket.shutdown(socket.SHUT_RDWR)

    def ask(self) -> http.client.HTTPResponse:
        self.http.request("GET", self.path, headers={"Accept": "image/*", "User-Agent": "relook"})
        return self.http.getresponse()

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut.cancel()
        self.http.close()


def public_address(host: str, port: int) -> str:
    """The first address of a host, all of whose addresses are public.

    Raises:
        DataError: it has an address in a private, local or special network.
        OSError: it has none.
    """
    found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(is_public(ipaddress.ip_address(str(address).partition("%")[0])) for address in found):
        raise DataError("The image's URL leads into a private network.", "Give a public URL.")
    return str(found[0])


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, also once what is wrapped in it is taken out."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner:
            return is_public(inner)
    return address.is_global and not address.is_multicast
