"""models and speeds that differ per host

Revision: 0009; follows 0008.

`own_models` stays: workers of the code before write into it when they start.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "worker_models",
        sa.Column("worker_id", sa.String(length=100), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("card", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["worker_id"], ["workers.id"], name=op.f("fk_worker_models_worker_id_workers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("worker_id", "name", name=op.f("pk_worker_models")),
    )
    op.create_index(op.f("ix_worker_models_name"), "worker_models", ["name"])
    op.add_column("workers", sa.Column("models", sa.JSON(), nullable=True))
    op.add_column("workers", sa.Column("speeds", sa.JSON(), nullable=True))
    # The code before knows no needs: its jobs have none.
    op.add_column("jobs", sa.Column("needs", sa.String(length=100), nullable=False, server_default=""))
    op.create_index(
        "ix_jobs_state_queue_needs_start_tag_px_id", "jobs", ["state", "queue", "needs", "start_tag_px", "id"]
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_state_queue_needs_start_tag_px_id", table_name="jobs")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("needs")
    with op.batch_alter_table("workers", schema=None) as batch_op:
        batch_op.drop_column("speeds")
        batch_op.drop_column("models")
    op.drop_index(op.f("ix_worker_models_name"), table_name="worker_models")
    op.drop_table("worker_models")
