"""What the presets of Qwen's family say, written out: of each, with a text, an image, and both."""

Key = tuple[str, str, str | None]  # preset, role, instruction
Said = tuple[str, str, str | None]

QWEN_STRINGS: dict[Key, Said] = {
    **dict.fromkeys(
        [("qwen3-vl-embedding", "query", None), ("qwen3-vl-embedding", "document", None)],
        (
            "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\nA cat and"
            " a dog<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
            "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n<image>"
            "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
            "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n<image>A "
            "cat and a dog<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
        ),
    ),
    **dict.fromkeys(
        [
            ("qwen3-vl-embedding", "query", " Find images "),  # stripped, and a full stop after it
            ("qwen3-vl-embedding", "document", "Find images."),
        ],
        (
            "<|im_start|>system\nFind images.<|im_end|>\n<|im_start|>user\nA cat and a dog"
            "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
            "<|im_start|>system\nFind images.<|im_end|>\n<|im_start|>user\n<image><|im_end|>\n"
            "<|im_start|>assistant\n<|endoftext|>",
            "<|im_start|>system\nFind images.<|im_end|>\n<|im_start|>user\n<image>A cat and a dog"
            "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
        ),
    ),
    **dict.fromkeys(
        [("gme-qwen2-vl", "query", None), ("gme-qwen2-vl", "document", None)],
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nA cat "
            "and a dog<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>"
            "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>A"
            " cat and a dog<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
        ),
    ),
    ("gme-qwen2-vl", "query", "Find an image that matches the given text."): (
        "<|im_start|>system\nFind an image that matches the given text.<|im_end|>\n<|im_start|>user"
        "\nA cat and a dog<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
        "<|im_start|>system\nFind an image that matches the given text.<|im_end|>\n<|im_start|>user"
        "\n<image><|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
        "<|im_start|>system\nFind an image that matches the given text.<|im_end|>\n<|im_start|>user"
        "\n<image>A cat and a dog<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
    ),
    **dict.fromkeys(
        [("vlm2vec-v2.0", "query", None), ("vlm2vec-v2.0", "document", None)],
        (
            "A cat and a dog",
            "<image> Represent the given image.",
            "<image> Represent the given image with the following question: A cat and a dog",
        ),
    ),
    **dict.fromkeys(
        [("vlm2vec-v2.0", "query", "Find it:"), ("vlm2vec-v2.0", "document", "Find it:")],
        ("Find it: A cat and a dog", "<image> Find it:", "<image> Find it: A cat and a dog"),
    ),
    **dict.fromkeys(
        [("lamra-ret", "query", None), ("lamra-ret", "document", None)],
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nA cat "
            "and a dog\nSummarize above sentence in one word: <|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>"
            "\nSummarize above image in one word: <|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>A"
            " cat and a dog\nSummarize above image and sentence in one word: <|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ),
    **dict.fromkeys(
        [("unite-qwen2-vl", "query", None), ("unite-qwen2-vl", "document", None)],
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nA cat "
            "and a dog\nSummary above sentence in one word:<|im_end|>\n<|im_start|>assistant\n"
            "<|endoftext|>",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>"
            "\nSummary above image in one word:<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>A"
            " cat and a dog\nSummary above sentence and image in one word:<|im_end|>\n"
            "<|im_start|>assistant\n<|endoftext|>",
        ),
    ),
    **dict.fromkeys(
        [("lco-embedding", "query", None), ("lco-embedding", "document", None)],
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nA cat "
            "and a dog\nSummarize the above text in one word:<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>"
            "\nSummarize the above image in one word:<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>A"
            " cat and a dog\nSummarize the above in one word:<|im_end|>\n<|im_start|>assistant\n",
        ),
    ),
    **dict.fromkeys(
        [("nomic-embed-multimodal", "query", None), ("nomic-embed-multimodal", "document", None)],
        (
            "A cat and a dog<|endoftext|><|endoftext|><|endoftext|><|endoftext|><|endoftext|>"
            "<|endoftext|><|endoftext|><|endoftext|><|endoftext|><|endoftext|>",
            "<|im_start|>user\n<image>Describe the image.<|im_end|><|endoftext|>",
            None,
        ),
    ),
    **dict.fromkeys(
        [
            ("jina-embeddings-v4", "query", None),
            ("jina-embeddings-v4-code", "query", None),
            ("jina-embeddings-v4-text-matching", "query", None),
            ("jina-embeddings-v4-text-matching", "document", None),
        ],
        (
            "Query: A cat and a dog",
            "<|im_start|>user\n<image>Describe the image.<|im_end|>\n",
            None,
        ),
    ),
    **dict.fromkeys(
        [
            ("jina-embeddings-v4", "document", None),
            ("jina-embeddings-v4-code", "document", None),
        ],
        (
            "Passage: A cat and a dog",
            "<|im_start|>user\n<image>Describe the image.<|im_end|>\n",
            None,
        ),
    ),
}
