package main

import (
	"math"
	"strings"
	"testing"
	"time"
)

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{"1": 1, "4096B": 4096, "512MiB": 512 << 20, "1GiB": 1 << 30, "100GiB": 100 << 30} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("%s: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "x", "-1GiB", "0", "1GB", "99999999TiB"} {
		if n, err := parseSize(s); err == nil {
			t.Errorf("%q was taken for %d", s, n)
		}
	}
}

func TestReport(t *testing.T) {
	at := func(iops ...float64) (s []sample) {
		for _, x := range iops {
			s = append(s, sample{IOPS: x, P99us: 1e5 / x, CPUus: x})
		}
		return s
	}
	row := allRows[0].Name
	rep := &report{Cells: []*cell{
		{Row: row, Server: "pollux", Samples: at(90, 30, 60)},
		{Row: row, Server: "qsd-cached", Samples: at(10, 20)},
		{Row: row, Server: "nbdkit-cached", Samples: at(30)},
		{Row: row, Server: "qsd-direct", Samples: at(1000)},
		{Row: row, Server: "nbdkit-nocache", Samples: at(100)},
	}}
	rep.finish()
	want := []verdict{
		{row, "to cached peer", "nbdkit-cached", 2, 1.2, false, true},
		{row, "to direct peer", "qsd-direct", 0.06, 0, false, false},
		{row, "p99 to peer", "nbdkit-cached", 0.5, 1, true, true},
		{row, "CPU to peer", "qsd-cached", 4, 0.7, true, false},
	}
	for i := range max(len(want), len(rep.Verdicts)) {
		if i >= len(want) || i >= len(rep.Verdicts) || math.Abs(want[i].Ratio-rep.Verdicts[i].Ratio) > 1e-9 {
			t.Fatalf("%+v, want %+v", rep.Verdicts, want)
		}
		if rep.Verdicts[i].Ratio = want[i].Ratio; rep.Verdicts[i] != want[i] {
			t.Errorf("%+v, want %+v", rep.Verdicts[i], want[i])
		}
	}
	var b strings.Builder
	rep.print(&b)
	for _, want := range []string{
		"| " + row + " | 0 | 1667 | 60.0 | **2.00** (≥ 1.2) | 0.06 | – | **0.50** (≤ 1) | 4.00 (not ≤ 0.7) |",
		"| " + row + " | pollux | 60 |", "2 of 3 wanted ratios are reached",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
}

// A cold row is compared with what reads from the device.
func TestColdPeers(t *testing.T) {
	for _, r := range allRows {
		for server, cold := range map[string]bool{"qsd-direct": true, "qsd-cached": false} {
			if peers(r, server) != (r.Cold == cold) {
				t.Errorf("%s on %s", r.Name, server)
			}
		}
	}
}

func TestRotated(t *testing.T) {
	list := []server{&peer{title: "a"}, &peer{title: "b"}, &peer{title: "c"}}
	for n, want := range []string{"abc", "bca", "cab", "abc"} {
		got := ""
		for _, s := range rotated(list, n) {
			got += s.name()
		}
		if got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
	if got := rotated(nil, 1); len(got) != 0 {
		t.Error(got)
	}
}

func TestTrace(t *testing.T) {
	var n bytesSeen
	direct := map[string]bool{"/disk/direct": true}
	for _, line := range []string{
		`recvmsg(5<socket:[4321]>, {msg_name=NULL, msg_iov=[{iov_base=""..., iov_len=4096}]}, 0) = 28`,
		`write(7<UNIX-STREAM:[1->2]>, ""..., 16) = 16`,
		`pwrite64(8</disk/file>, ""..., 4096, 0) = 4096`,
		`preadv(9</disk/direct>, [{iov_base=""..., iov_len=4096}], 1, 0) = 512`,
		`read(4<anon_inode:[eventfd]>, ""..., 8) = 8`,
		`read(5<socket:[4321]>, 0xc000, 4096) = -1 EAGAIN (Resource temporarily unavailable)`,
		`+++ exited with 0 +++`,
	} {
		n.add(line, direct)
	}
	if want := (bytesSeen{socket: 44, file: 4096}); n != want {
		t.Errorf("%+v, want %+v", n, want)
	}
}

func TestFlat(t *testing.T) {
	rep := &memoryReport{}
	for n := range 60 {
		w := watch{Seconds: float64(30 * n), RSS: 1 << 30}
		w.Read.P99us, w.Write.P99us = 100, 200
		if n < 20 {
			w.RSS /= 2 // caches fill
		}
		rep.Watches = append(rep.Watches, w)
	}
	rep.finish()
	if err := rep.judge(); err != nil || rep.Slope != 0 || rep.Peak != 1<<30 {
		t.Errorf("%+v: %v", rep, err)
	}
	for n := range rep.Watches {
		rep.Watches[n].RSS += int64(n) << 20
		if n >= 30 {
			rep.Watches[n].Write.P99us *= 2
		}
	}
	rep.finish()
	if math.Abs(rep.Slope-120<<20) > 1 {
		t.Errorf("a MiB each 30 s is %v bytes an hour", rep.Slope)
	}
	if err := rep.judge(); err == nil || !strings.Contains(err.Error(), "grew by 2.") || !strings.Contains(err.Error(), "writes in the second half is 2.00") {
		t.Error(err)
	}
}

func TestRowArguments(t *testing.T) {
	for _, r := range allRows {
		args := strings.Join(r.args(options{size: 1 << 30, log: 256 << 20, runtime: 5 * time.Second}), " ")
		timed := strings.Contains(args, "--time_based --runtime=5")
		if sized := strings.Contains(args, "--io_size="); sized == timed || sized != (r.Bytes != nil) {
			t.Errorf("%s: %s", r.Name, args)
		}
		if !strings.Contains(args, "--iodepth=") || !strings.Contains(args, "--numjobs=") {
			t.Errorf("%s: %s", r.Name, args)
		}
		if r.suits("pollux") == r.suits("pollux-cold") {
			t.Errorf("%s is measured on both pairs or on none", r.Name)
		}
	}
}
