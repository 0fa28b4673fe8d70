"""What several test files share: random tiny models, data in every form, a grid and its rows."""
