"""Alembic's scripts: one file a version in ``versions``, run by ``palate.users.database.upgrade``.

To add one, change ``palate/users/schema.py`` and write the next file by hand after the last; a test compares both.
"""
