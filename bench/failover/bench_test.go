package main

import (
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
)

func TestWatch(t *testing.T) {
	at := time.Unix(0, 0)
	w := watch{last: at, connects: 3, began: 3}
	for _, r := range []struct {
		gap      time.Duration
		connects int
	}{{5, 3}, {70, 4}, {9, 4}, {80, 5}, {1, 5}} {
		at = at.Add(r.gap * time.Millisecond)
		w.reply(at, r.connects, nbdclient.Write)
	}
	if ms(w.pause) != 70 || ms(w.after) != 80 || ms(w.longest) != 80 || w.replies != 5 {
		t.Errorf("%+v", w)
	}
}

func TestReport(t *testing.T) {
	rep := &report{}
	kill, hang := rep.add(caseKill, "kill -9"), rep.add(caseHang, "SIGSTOP")
	for range 100 {
		kill.Samples = append(kill.Samples, sample{Pause: 30, Total: 20, Steps: []namedTime{{"map", 1}, {"serve", 2}, {"map", 3}}})
	}
	kill.Samples[7].Pause = 5000 // beyond the 99th percentile
	hang.Samples = []sample{{Pause: 1400}, {Pause: 1200}}
	rep.finish()
	if err := rep.judge(); err != nil {
		t.Error(err)
	}
	if s := kill.Steps[1]; s.Name != "map" || s.P50 != 4 {
		t.Errorf("%+v", kill.Steps)
	}
	var b strings.Builder
	rep.print(&b)
	for _, want := range []string{"| kill -9 | 100 | 30.0 | 30.0 | 30.0 | 5000.0 |", "| kill -9 | all steps | 20.00 | 20.00 |", "| SIGSTOP | 2 |"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
	kill.Samples[8].Pause = 101
	hang.Samples[0].Pause = 1501
	rep.finish()
	if err := rep.judge(); err == nil || strings.Count(err.Error(), "promised") != 2 {
		t.Error(err)
	}
}
