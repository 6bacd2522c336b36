package main

import (
	"fmt"
	"math"
	"slices"
	"time"
)

// What is wanted.
const (
	ofOracle   = 0.90 // of the oracle's hits, where what is hot stays so
	afterScan  = 0.02 // less hits in the hour after a scan than on the day before
	prediction = 0.03 // between what was predicted and what came
)

// verdicts says what is reached of what is wanted.
func (o *outcome) verdicts() []verdict {
	var out []verdict
	say := func(ok bool, format string, args ...any) {
		out = append(out, verdict{ok, fmt.Sprintf(format, args...)})
	}
	if o.steady {
		part := float64(o.Policy.Hits) / float64(o.Oracle.Hits)
		say(part >= ofOracle, "%.3f of the oracle's hits (%.2f)", part, ofOracle)
	}
	if o.days {
		// An hour may be less predictable than a day; the oracle shows by how much.
		lost := o.Before - o.After - max(0, o.OracleBefore-o.OracleAfter)
		say(lost <= afterScan, "hit share %.1f %% on the day, %.1f %% in the hour after the scan, the oracle's %.1f and %.1f %% (%.0f points)",
			100*o.Before, 100*o.After, 100*o.OracleBefore, 100*o.OracleAfter, 100*afterScan)
	}
	if o.Limit > 0 {
		longest := time.Duration(math.MaxInt64)
		if len(o.Followed) > 0 {
			longest = slices.Max(o.Followed)
		}
		say(longest <= o.Limit, "the hot spot is followed within %v (%v)", longest.Round(time.Second), o.Limit.Round(time.Second))
	}
	say(math.Abs(o.Predicted-o.Measured) <= prediction, "%.1f %% of hits predicted, %.1f %% measured (%.0f points)", 100*o.Predicted, 100*o.Measured, 100*prediction)
	return out
}

// print writes a table of all outcomes and what is reached, and returns whether all is.
func print(all []*outcome) bool {
	if len(all) == 0 {
		return true
	}
	fmt.Println("| workload | flash | no flash | policy | LRU | oracle | time: no flash | policy | LRU | sets moved: policy | LRU |")
	fmt.Println("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
	for _, o := range all {
		fmt.Printf("| %s | %.1f %% | 0 | %.1f %% | %.1f %% | %.1f %% | %.2f ms | %.2f ms | %.2f ms | %d | %d |\n",
			o.Name, 100*float64(o.Slots)/float64(o.Sets), 100*o.Policy.share(), 100*o.LRU.share(), 100*o.Oracle.share(),
			ms(o.None.mean()), ms(o.Policy.mean()), ms(o.LRU.mean()), o.Promoted+o.Demoted, o.Fetched)
	}
	good := true
	for _, o := range all {
		fmt.Println()
		for _, v := range o.verdicts() {
			mark := "reached"
			if !v.Reached {
				mark, good = "MISSED", false
			}
			fmt.Printf("* %s: %s: %s\n", o.Name, mark, v.Text)
		}
		if o.days {
			fmt.Printf("* %s: the LRU cache hits %.1f %% on the day, %.1f %% in the hour after the scan\n", o.Name, 100*o.LRUBefore, 100*o.LRUAfter)
		}
		fmt.Printf("* %s: mean time %.2f ms predicted, %.2f ms measured\n", o.Name, ms(o.PredictedMean), ms(o.MeasuredMean))
	}
	return good
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
