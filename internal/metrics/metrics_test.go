package metrics

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/pollux-storage/pollux/internal/control"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func sample() control.Status {
	return control.Status{
		Agent: control.AgentStatus{Running: true, Version: "v1"}, Protected: true, Alerts: []string{"one"},
		LastTakeover: &control.Takeover{Kind: "takeover", Started: time.Unix(1000, 0), Total: control.Duration(40 * time.Millisecond)},
		Guests: []control.GuestStatus{{
			Name: "a", State: control.StateServing, ServedBy: "a", Protected: true, Restarts: 2, Policy: "restart-first", Resumed: 53, ResumedLate: 54, Spare: true, Alerts: []string{"two"},
			Memory: control.MemoryStatus{Resident: 5, Cache: 6},
			PoolStats: []control.PoolStatus{{Name: "p", Capacity: 100, Free: 60, LogBytes: 50, LogUsed: 5, Dirty: 4, CP: 9, Error: "no", PagesMended: 13, Cleaner: control.CleanerStatus{Freed: 3},
				Dedup: control.DedupStatus{DedupCounts: control.DedupCounts{Shared: 14, Written: 15, Zeros: 16}, Unequal: 17, Saved: 18, IndexBytes: 19, IndexEntries: 20, MeanExtent: 21.5},
				Scrub: control.ScrubStatus{State: control.ScrubRunning, Last: control.ScrubResult{Unreadable: 12}},
				Flash: &control.FlashStatus{State: control.FlashFailed, SetBytes: 30, Slots: 31, Used: 32, Lost: 33, Promoted: 34, Demoted: 35, GivenUp: 36, FailedMoves: 37, Queued: 38,
					WrittenByClients: 39, WrittenByMoves: 40, Worn: 41, Left: 42, PinsWithoutRoom: 43, RulesBroken: 44, Primaries: []control.FlashPrimary{{Device: "/one",
						Flash:   control.FlashTier{Reads: 45, Writes: 46, ReadBytes: 47, WriteBytes: 48, ReadLatency: control.Duration(time.Millisecond)},
						Primary: control.FlashTier{Reads: 49, Writes: 50, ReadBytes: 51, WriteBytes: 52, WriteLatency: control.Duration(9 * time.Millisecond)}}}}}},
			Devices: []control.DeviceStatus{
				{Pool: "p", Path: "/one", Size: 7, Mirror: 1, State: "in sync", Repaired: 1},
				{Pool: "p", Path: "/two", Size: 7, Mirror: 1, State: "resilvering", Resilver: 8, DeviceErrors: control.DeviceErrors{ReadErrors: 2, WriteErrors: 5}},
				{Pool: "p", Path: "/three", DeviceErrors: control.DeviceErrors{Corrupt: 6}},
				{Pool: "p", Mirror: 1, State: "absent"},
			},
			Exports: []control.Export{{Volume: "v", Guest: "a", Size: 77, Connections: 3, VhostUser: &control.VhostUser{VolumeSocket: control.VolumeSocket{Socket: "/s", Clients: 60, SocketCounts: control.SocketCounts{
				Reads: 61, Writes: 62, Flushes: 63, Discards: 64, WriteZeroes: 65, Errors: 66, ReadBytes: 67, WrittenBytes: 68, Resubmitted: 69, Skipped: 70}}},
				Ring: &control.VolumeSocket{Socket: "/r", Clients: 80, SocketCounts: control.SocketCounts{
					Reads: 81, Writes: 82, Flushes: 83, Discards: 84, WriteZeroes: 85, Errors: 86, ReadBytes: 87, WrittenBytes: 88, Resubmitted: 89, Skipped: 90}}, Survey: &control.VolumeSurvey{At: time.Unix(2000, 0), WouldFree: 22, MeanExtent: 23.5}},
				{Volume: "unknown", Guest: "a", VhostUser: &control.VhostUser{VolumeSocket: control.VolumeSocket{Note: "no socket"}}, Ring: &control.VolumeSocket{Note: "no socket"}}},
		}, {
			// The other one tells of the same pool in the middle of a takeover.
			Name: "b", State: control.StateTakeover, PoolStats: []control.PoolStatus{{Name: "p", Capacity: 100, Flash: &control.FlashStatus{}}, {Name: "q"}},
		}},
	}
}

// What is scraped follows the conventions, has the values of the status, and is
// described in the documentation.
func TestCollector(t *testing.T) {
	c := &collector{status: func(context.Context) (control.Status, error) { return sample(), nil }, log: quiet}
	problems, err := testutil.CollectAndLint(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	text := scrape(t, c.status)
	for _, want := range []string{
		`pollux_up 1`, `pollux_protected 1`, `pollux_alerts 2`, `pollux_build_info{version="v1"} 1`,
		`pollux_last_takeover_seconds{kind="takeover"} 0.04`, `pollux_last_takeover_timestamp_seconds{kind="takeover"} 1000`,
		`pollux_guest_state{guest="a",state="serving"} 1`, `pollux_guest_state{guest="b",state="takeover"} 1`,
		`pollux_guest_served{guest="b"} 0`, `pollux_guest_restarts_total{guest="a"} 2`,
		`pollux_guest_policy{guest="a",policy="restart-first"} 1`, `pollux_guest_restarts_in_place_total{guest="a"} 53`, `pollux_guest_restarts_late_total{guest="a"} 54`, `pollux_guest_spare{guest="a"} 1`,
		`pollux_guest_resident_bytes{guest="a"} 5`, `pollux_guest_cache_bytes{guest="a"} 6`,
		`pollux_pool_capacity_bytes{pool="p"} 100`, `pollux_pool_free_bytes{pool="p"} 60`, `pollux_pool_log_bytes{pool="p"} 50`,
		`pollux_pool_log_used_bytes{pool="p"} 5`, `pollux_pool_dirty_bytes{pool="p"} 4`, `pollux_pool_failing{pool="p"} 1`,
		`pollux_pool_consistency_points_total{pool="p"} 9`, `pollux_pool_cleaned_tracks_total{pool="p"} 3`,
		`pollux_pool_scrub_running{pool="p"} 1`, `pollux_pool_scrub_unreadable_blocks{pool="p"} 12`,
		`pollux_pool_page_repairs_total{pool="p"} 13`,
		`pollux_pool_dedup_shared_blocks_total{pool="p"} 14`, `pollux_pool_dedup_written_blocks_total{pool="p"} 15`,
		`pollux_pool_dedup_zero_blocks_total{pool="p"} 16`, `pollux_pool_dedup_unequal_series_total{pool="p"} 17`,
		`pollux_pool_dedup_saved_bytes{pool="p"} 18`, `pollux_pool_dedup_index_bytes{pool="p"} 19`, `pollux_pool_dedup_index_entries{pool="p"} 20`,
		`pollux_volume_vhost_user_clients{guest="a",volume="v"} 60`,
		`pollux_volume_vhost_user_requests_total{guest="a",kind="read",volume="v"} 61`, `pollux_volume_vhost_user_requests_total{guest="a",kind="write",volume="v"} 62`,
		`pollux_volume_vhost_user_requests_total{guest="a",kind="flush",volume="v"} 63`, `pollux_volume_vhost_user_requests_total{guest="a",kind="discard",volume="v"} 64`,
		`pollux_volume_vhost_user_requests_total{guest="a",kind="write_zeroes",volume="v"} 65`, `pollux_volume_vhost_user_errors_total{guest="a",volume="v"} 66`,
		`pollux_volume_vhost_user_bytes_total{direction="read",guest="a",volume="v"} 67`, `pollux_volume_vhost_user_bytes_total{direction="write",guest="a",volume="v"} 68`,
		`pollux_volume_vhost_user_resubmitted_total{guest="a",outcome="run",volume="v"} 69`, `pollux_volume_vhost_user_resubmitted_total{guest="a",outcome="known",volume="v"} 70`,
		`pollux_volume_ring_clients{guest="a",volume="v"} 80`,
		`pollux_volume_ring_requests_total{guest="a",kind="read",volume="v"} 81`, `pollux_volume_ring_requests_total{guest="a",kind="write",volume="v"} 82`,
		`pollux_volume_ring_requests_total{guest="a",kind="flush",volume="v"} 83`, `pollux_volume_ring_requests_total{guest="a",kind="discard",volume="v"} 84`,
		`pollux_volume_ring_requests_total{guest="a",kind="write_zeroes",volume="v"} 85`, `pollux_volume_ring_errors_total{guest="a",volume="v"} 86`,
		`pollux_volume_ring_bytes_total{direction="read",guest="a",volume="v"} 87`, `pollux_volume_ring_bytes_total{direction="write",guest="a",volume="v"} 88`,
		`pollux_volume_ring_resubmitted_total{guest="a",outcome="run",volume="v"} 89`, `pollux_volume_ring_resubmitted_total{guest="a",outcome="known",volume="v"} 90`,
		`pollux_pool_mean_extent_blocks{pool="p"} 21.5`, `pollux_volume_would_free_bytes{guest="a",volume="v"} 22`,
		`pollux_volume_mean_extent_blocks{guest="a",volume="v"} 23.5`, `pollux_volume_survey_timestamp_seconds{guest="a",volume="v"} 2000`,
		`pollux_pool_flash_requests_total{device="/one",operation="read",pool="p",tier="flash"} 45`,
		`pollux_pool_flash_requests_total{device="/one",operation="write",pool="p",tier="flash"} 46`,
		`pollux_pool_flash_requests_total{device="/one",operation="read",pool="p",tier="device"} 49`,
		`pollux_pool_flash_requests_total{device="/one",operation="write",pool="p",tier="device"} 50`,
		`pollux_pool_flash_request_bytes_total{device="/one",operation="write",pool="p",tier="flash"} 48`,
		`pollux_pool_flash_request_bytes_total{device="/one",operation="read",pool="p",tier="device"} 51`,
		`pollux_pool_flash_latency_seconds{device="/one",operation="read",pool="p",tier="flash"} 0.001`,
		`pollux_pool_flash_latency_seconds{device="/one",operation="write",pool="p",tier="device"} 0.009`,
		`pollux_pool_flash_set_bytes{pool="p"} 30`, `pollux_pool_flash_slots{pool="p"} 31`, `pollux_pool_flash_used_slots{pool="p"} 32`,
		`pollux_pool_flash_lost_sets{pool="p"} 33`, `pollux_pool_flash_failed{pool="p"} 1`,
		`pollux_pool_flash_moved_sets_total{move="to_flash",pool="p"} 34`, `pollux_pool_flash_moved_sets_total{move="to_device",pool="p"} 35`,
		`pollux_pool_flash_moved_sets_total{move="given_up",pool="p"} 36`, `pollux_pool_flash_failed_moves_total{pool="p"} 37`,
		`pollux_pool_flash_queued_moves{pool="p"} 38`, `pollux_pool_flash_written_bytes_total{by="clients",pool="p"} 39`,
		`pollux_pool_flash_written_bytes_total{by="moves",pool="p"} 40`, `pollux_pool_flash_worn_bytes{pool="p"} 41`,
		`pollux_pool_flash_evacuation_left_sets{pool="p"} 42`, `pollux_pool_flash_pins_without_room{pool="p"} 43`, `pollux_pool_flash_rule_errors_total{pool="p"} 44`,
		`pollux_pool_absent_copies{pool="p"} 1`, `pollux_copy_in_sync{device="/one",pool="p"} 1`, `pollux_copy_in_sync{device="/two",pool="p"} 0`,
		`pollux_copy_resilver_bytes{device="/two",pool="p"} 8`, `pollux_device_read_errors_total{device="/two",pool="p"} 2`,
		`pollux_device_write_errors_total{device="/two",pool="p"} 5`, `pollux_device_corrupt_blocks_total{device="/three",pool="p"} 6`,
		`pollux_copy_repairs_total{device="/one",pool="p"} 1`, `pollux_device_size_bytes{device="/one",pool="p"} 7`,
		`pollux_volume_size_bytes{guest="a",volume="v"} 77`, `pollux_volume_connections{guest="a",volume="v"} 3`,
	} {
		if !strings.Contains(text, "\n"+want+"\n") {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	if strings.Contains(text, `would_free_bytes{guest="a",volume="unknown"`) {
		t.Error("a volume that nobody has surveyed has figures")
	}
	if strings.Contains(text, `flash_slots{pool="q"`) {
		t.Error("a pool without flash has figures of it")
	}
	docs, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range Metrics {
		if row := "| `" + m.Name + "` | " + strings.Join(m.Labels, ", ") + " | " + m.Help + " |"; !strings.Contains(string(docs), row) {
			t.Errorf("docs/operations.md lacks the row\n%s", row)
		}
	}
}

// Without a status there is an answer all the same.
func TestNoStatus(t *testing.T) {
	text := scrape(t, func(context.Context) (control.Status, error) { return control.Status{}, errors.New("ending") })
	if !strings.Contains(text, "\npollux_up 0\n") || strings.Contains(text, "pollux_protected") {
		t.Error(text)
	}
}

func scrape(t *testing.T, status Status) string {
	t.Helper()
	w := httptest.NewRecorder()
	Handler(status, quiet).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("%d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func TestHealth(t *testing.T) {
	unprotected := sample()
	unprotected.Protected = false
	for name, test := range map[string]struct {
		status Status
		code   int
		want   Health
	}{
		"well":        {func(context.Context) (control.Status, error) { return sample(), nil }, 200, Health{true, []string{"one", "guest a: two"}}},
		"unprotected": {func(context.Context) (control.Status, error) { return unprotected, nil }, 503, Health{false, []string{"one", "guest a: two"}}},
		"no status":   {func(context.Context) (control.Status, error) { return control.Status{}, errors.New("ending") }, 503, Health{false, []string{"ending"}}},
	} {
		w := httptest.NewRecorder()
		Handler(test.status, quiet).ServeHTTP(w, httptest.NewRequest("GET", "/healthz", nil))
		var got Health
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		if w.Code != test.code || got.Protected != test.want.Protected || strings.Join(got.Problems, ";") != strings.Join(test.want.Problems, ";") {
			t.Errorf("%s: %d %+v", name, w.Code, got)
		}
	}
}

// TestText: a status by itself gives the same lines as a scrape, but for those of a process.
func TestText(t *testing.T) {
	text, err := Text(control.Status{Protected: true, Guests: []control.GuestStatus{{Name: "a", State: control.StateServing}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\npollux_protected 1\n", "\npollux_up 1\n", "\npollux_guest_state{guest=\"a\",state=\"serving\"} 1\n"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if strings.Contains(string(text), "go_goroutines") {
		t.Error("it tells of this process")
	}
}
