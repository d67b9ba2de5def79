"""The page at ``/``: chats and completions token by token, without anything from another server."""
