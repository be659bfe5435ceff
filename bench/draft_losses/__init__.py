"""What a draft learns in equal time: by loss, depth and width."""
