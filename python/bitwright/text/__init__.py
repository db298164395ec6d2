"""Text, chats and token ids as samples of equal length."""
