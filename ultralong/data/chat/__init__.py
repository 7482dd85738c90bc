"""Conversations to tokens and a loss mask, packed into rows."""
