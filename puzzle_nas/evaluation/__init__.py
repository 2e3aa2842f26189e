"""What a child lost against its parent: by domain of text, by task, by length, and as judged."""
