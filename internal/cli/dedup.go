package cli

import "github.com/spf13/cobra"

func newDedup(s *session) *cobra.Command {
	return group("dedup", groupStorage, "What deduplication saves",
		"What deduplication saves, or would save. Volumes share blocks that are stored already if `volume set --dedup on` says so.",
		newDedupEstimate(s), newDedupStatus(s), newDedupScan(s), newDedupUndo(s), newDedupSurvey(s))
}
