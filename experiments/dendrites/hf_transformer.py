"""Dendrites in a Hugging Face Trainer: a small BERT built from a config reads digits as sequences
of 64 grey levels.

Needs the extra: pip install 'pilimit[dendrites]'. Nothing is downloaded.

    python -m experiments.dendrites.hf_transformer --epochs 12 --out results/dendrites/transformer
"""

import transformers

from pilimit_lib.dendrites import DendriteConfig, Patience, dendritic
from pilimit_lib.dendrites.integrations.huggingface import DendriteCallback

from ..training.flags import add_out, plain_command_line
from .data import digits


def examples(split) -> list[dict]:
    """Each image as 64 tokens 0..16, its grey levels row by row."""
    x, y = split
    return [
        {"input_ids": image, "labels": label}
        for image, label in zip((x * 16).round().long().flatten(1), y)
    ]


def main(argv=None):
    parser = plain_command_line("dendrites.hf_transformer", __doc__)
    parser.add_argument("--epochs", type=int, default=12, help="epochs at most (default 12)")
    parser.add_argument(
        "--patience",
        type=int,
        default=3,
        help="epochs without progress before dendrites grow (default 3)",
    )
    add_out(parser, "results/dendrites/transformer", "folder of tables and pictures")
    args = parser.parse_args(argv)
    transformers.set_seed(0)
    bert = transformers.BertConfig(
        vocab_size=17,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config = DendriteConfig(
        switch=Patience(patience=args.patience),
        max_dendrites=2,
        save_dir=str(args.out),
        seed=0,
        track=["BertEmbeddings"],
    )
    model = dendritic(transformers.BertForSequenceClassification(bert), config)
    sets, callback = digits(), DendriteCallback("eval_accuracy", config)
    arguments = transformers.TrainingArguments(
        output_dir=str(args.out),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=50,
        per_device_eval_batch_size=100,
        learning_rate=2e-3,
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=examples(sets["train"]),
        eval_dataset=examples(sets["val"]),
        callbacks=[callback],
        compute_metrics=lambda p: {
            "accuracy": 100 * float((p.predictions.argmax(-1) == p.label_ids).mean())
        },
    )
    trainer.train()
    for row in callback.growth.records.rows.best.values():
        print(row)


if __name__ == "__main__":
    main()
