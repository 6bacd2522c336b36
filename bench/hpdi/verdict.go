package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// verdict compares Pollux with the best of its peers that have the data, in one row.
type verdict struct {
	Row     string  `json:"row"`
	Server  string  `json:"server"` // of Pollux
	To      string  `json:"to"`
	Ratio   float64 `json:"ratio"`
	Wanted  float64 `json:"wanted,omitempty"` // 0: nothing
	Reached bool    `json:"reached"`
}

// verdicts compares what was measured. A peer that has no data is shown and compared with
// nobody: reading nothing is no service.
func verdicts(lines []line) []verdict {
	var list []verdict
	for _, row := range rows {
		var best *line
		var own []line
		for i, l := range lines {
			if l.Row != row.name {
				continue
			}
			switch {
			case l.Server == "pollux" || l.Server == "ceiling":
				own = append(own, l)
			case l.Server != "qsd-null" && (best == nil || l.Median.IOPS > best.Median.IOPS):
				best = &lines[i]
			}
		}
		if best == nil {
			continue
		}
		for _, l := range own {
			v := verdict{Row: row.name, Server: l.Server, To: best.Server, Ratio: l.Median.IOPS / best.Median.IOPS, Reached: true}
			if l.Server == "pollux" {
				v.Wanted, v.Reached = row.want, v.Ratio >= row.want
			}
			list = append(list, v)
		}
	}
	return list
}

func (r report) print(w io.Writer) {
	fmt.Fprintf(w, "%s\n\n", r.Machine)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "row\tserver\trequests/s\tp50 µs\tp99 µs\tserver CPU µs\tallocations\t")
	for _, l := range r.Lines {
		m := l.Median
		fmt.Fprintf(t, "%s\t%s\t%.0f\t%.1f\t%.1f\t%.2f\t%.4f\t\n", l.Row, l.Server, m.IOPS, m.P50us, m.P99us, m.CPUus, m.Allocs)
	}
	_ = t.Flush() // to the terminal
	fmt.Fprintln(w)
	t = tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "row\tserver\tto\tratio\twanted\t\t")
	for _, v := range r.Verdicts {
		wanted, word := "", ""
		if v.Wanted > 0 {
			wanted, word = fmt.Sprintf("%.1f", v.Wanted), "reached"
			if !v.Reached {
				word = "MISSED"
			}
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%.2f\t%s\t%s\t\n", v.Row, v.Server, v.To, v.Ratio, wanted, word)
	}
	_ = t.Flush()
	if i := r.Idle; i != nil {
		fmt.Fprintf(w, "\n%d idle disks: the guest takes %.2f %% of a processor, %.2f %% without them, wanted at most %.0f\n", i.Disks, i.Percent, i.Before, idleWanted)
	}
}

// missed returns an error that names what was wanted and not reached.
func (r report) missed() error {
	var miss []string
	for _, v := range r.Verdicts {
		if !v.Reached {
			miss = append(miss, fmt.Sprintf("%s is %.2f times %s, wanted %.1f", v.Row, v.Ratio, v.To, v.Wanted))
		}
	}
	for _, l := range r.Lines {
		// What is made once for a run of some seconds is far below this.
		if l.Median.Allocs > 0.02 {
			miss = append(miss, fmt.Sprintf("%s at %s: %.3f allocations for a request", l.Row, l.Server, l.Median.Allocs))
		}
	}
	if i := r.Idle; i != nil && i.Percent-i.Before > idleWanted {
		miss = append(miss, fmt.Sprintf("%d idle disks take %.2f %% of a processor, wanted at most %.0f", i.Disks, i.Percent-i.Before, idleWanted))
	}
	if len(miss) > 0 {
		return fmt.Errorf("not reached: %s", strings.Join(miss, "; "))
	}
	return nil
}
