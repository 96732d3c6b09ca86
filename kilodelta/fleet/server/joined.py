"""Join this process's memory into huge pages; importing this module, after all others, does it."""

from kilodelta.fleet.server.huge_pages import join_pages

join_pages()
