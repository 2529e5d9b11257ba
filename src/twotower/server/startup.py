"""What a server does before it loads a model: it looks at its certificate and takes its port."""

import errno
import socket
import ssl
from contextlib import ExitStack

from twotower.errors import SettingError
from twotower.server.config import ServerConfig

# How many connections may wait to be taken.
_BACKLOG = 2048


def check_certificate(config: ServerConfig) -> None:
    """Raises ValueError where the certificate for HTTPS and its key can't be read or don't belong together."""
    if config.ssl_certfile is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except OSError as error:  # TLS errors are among them
        key = "" if config.ssl_keyfile is None else f" with the key {config.ssl_keyfile}"
        raise ValueError(
            f"the certificate {config.ssl_certfile}{key} can't be used: {error}; give PEM files"
        ) from error


def listen(config: ServerConfig) -> list[socket.socket]:
    """Sockets that listen on the server's port, one for each address of its host; clients may connect from now on.

    Raises SettingError for a port that is taken or not allowed, and for a host that is not this machine.
    """
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise SettingError("host", config.host, "a name or an address of this machine", _HOSTS) from error
    listening: list[socket.socket] = []
    port = config.port
    with ExitStack() as opened:
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                one = opened.enter_context(socket.socket(family))
                _bind(one, (address[0], port, *address[2:]))
            except OSError as error:
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    continue  # as ::1 of localhost where the machine has no IPv6
                raise _refused(config, error) from error
            listening.append(one)
            port = one.getsockname()[1]  # where any would do, all addresses have the same
        if not listening:
            raise SettingError("host", config.host, "an address of this machine", _HOSTS)
        opened.pop_all()
    return listening


_HOSTS = "127.0.0.1 is for this machine alone, 0.0.0.0 for all of its networks"


def _bind(one: socket.socket, address: tuple[object, ...]) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if one.family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    one.bind(address)
    # Now and not when the server runs: before, a second server could take the same port.
    one.listen(_BACKLOG)
    one.setblocking(False)


def _refused(config: ServerConfig, error: OSError) -> ValueError:
    if error.errno == errno.EADDRINUSE:
        fix = "another program listens there: stop it, or choose another port, of which 0 is any that is free"
        return SettingError("port", config.port, f"a free port of {config.host}", fix)
    if error.errno in (errno.EACCES, errno.EPERM):
        fix = "those below 1024 are often for root alone: choose one above, and let a proxy listen there"
        return SettingError("port", config.port, "a port on which this user may listen", fix)
    return SettingError("host", config.host, f"an address to listen on ({error.strerror})", _HOSTS)
