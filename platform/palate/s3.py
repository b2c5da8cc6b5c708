"""S3 as s3fs has it, but for one header: an upload does not wait for the server's word before it sends its body.

botocore asks for that by ``Expect: 100-continue``, and aiohttp waits for it without a limit: a server that took the
request and fell silent would hold a job for ever. Without it the limit for reading an answer holds (15 s, and tries).
"""

from typing import Any

from botocore.handlers import add_expect_header
from s3fs import S3FileSystem


class S3(S3FileSystem):
    """What ``artifacts.locate`` gives for ``s3://``."""

    _told: Any = None  # the client that does not ask

    async def set_session(self, *arguments: Any, **options: Any) -> Any:
        """The client, by which every operation begins; it is made at the first, or where it is asked for anew."""
        client = await super().set_session(*arguments, **options)
        if client is not self._told:
            client.meta.events.unregister("before-call.s3", add_expect_header)
            self._told = client
        return client
