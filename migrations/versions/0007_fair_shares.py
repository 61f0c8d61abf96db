"""fair shares of the workers: a start tag for each job, and indexes by it

Revision: 0007; follows 0006.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# Whatever can still be claimed or retried. A preview counts as a whole picture here.
_MEASURE_THOSE_THAT_MAY_WAIT = """
    UPDATE jobs SET output_px = CAST(input_width AS BIGINT) * input_height * scale * scale WHERE state <> 'succeeded'
"""
# Of the jobs that wait while this runs, each starts where the one before it of the same key and queue ends, as if all
# keys had handed in theirs at one moment.
_TAG_THOSE_THAT_WAIT = """
    UPDATE jobs SET start_tag_px = (
        SELECT COALESCE(SUM(before.output_px), 0) FROM jobs AS before
        WHERE before.state = 'queued' AND before.owner_key_id = jobs.owner_key_id
        AND before.queue = jobs.queue AND before.id < jobs.id
    )
    WHERE state = 'queued'
"""


def upgrade() -> None:
    op.add_column("jobs", sa.Column("output_px", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("start_tag_px", sa.BigInteger(), server_default="0", nullable=False))
    op.execute(_MEASURE_THOSE_THAT_MAY_WAIT)
    op.execute(_TAG_THOSE_THAT_WAIT)
    op.create_index("ix_jobs_state_queue_start_tag_px_id", "jobs", ["state", "queue", "start_tag_px", "id"])
    op.create_index(
        "ix_jobs_owner_key_id_state_queue_start_tag_px", "jobs", ["owner_key_id", "state", "queue", "start_tag_px"]
    )
    op.drop_index("ix_jobs_state_queue_id", "jobs")
    op.drop_index("ix_jobs_owner_key_id_state", "jobs")


def downgrade() -> None:
    op.create_index("ix_jobs_owner_key_id_state", "jobs", ["owner_key_id", "state"])
    op.create_index("ix_jobs_state_queue_id", "jobs", ["state", "queue", "id"])
    op.drop_index("ix_jobs_owner_key_id_state_queue_start_tag_px", "jobs")
    op.drop_index("ix_jobs_state_queue_start_tag_px_id", "jobs")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_column("start_tag_px")
        batch_op.drop_column("output_px")
