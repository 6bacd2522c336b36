package metrics

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/pollux-storage/pollux/internal/control"
)

// Metric is one family of metrics that the collector sends.
type Metric struct {
	Name, Help string
	Labels     []string
	counter    bool
	desc       *prometheus.Desc
	collect    func(st *control.Status, send sender)
}

// sender takes a value and the values of the labels.
type sender func(v float64, labels ...string)

// gauge and counter make a Metric.
func gauge(name, help string, labels []string, collect func(*control.Status, sender)) Metric {
	return Metric{Name: name, Help: help, Labels: labels, desc: prometheus.NewDesc(name, help, labels, nil), collect: collect}
}

func counter(name, help string, labels []string, collect func(*control.Status, sender)) Metric {
	m := gauge(name, help, labels, collect)
	m.counter = true
	return m
}

// ofGuests sends what f says of each guest.
func ofGuests(f func(*control.GuestStatus) float64) func(*control.Status, sender) {
	return func(st *control.Status, send sender) {
		for i := range st.Guests {
			send(f(&st.Guests[i]), st.Guests[i].Name)
		}
	}
}

// ofPools sends what f says of each open pool.
func ofPools(f func(*control.PoolStatus) float64) func(*control.Status, sender) {
	return func(st *control.Status, send sender) {
		for _, g := range st.Guests {
			for i := range g.PoolStats {
				send(f(&g.PoolStats[i]), g.PoolStats[i].Name)
			}
		}
	}
}

// ofLLRRM sends what f says of the low-latency memory of each open pool that has some.
func ofLLRRM(f func(*control.LLRRMStatus) float64) func(*control.Status, sender) {
	return func(st *control.Status, send sender) {
		for _, g := range st.Guests {
			for i := range g.PoolStats {
				if p := &g.PoolStats[i]; p.LLRRM != nil {
					send(f(p.LLRRM), p.Name)
				}
			}
		}
	}
}

// ofFlash sends what f says of the flash of each open pool that has some.
func ofFlash(f func(*control.FlashStatus) float64) func(*control.Status, sender) {
	return eachFlash(func(pool string, s *control.FlashStatus, send sender) { send(f(s), pool) })
}

// eachFlash calls f for the flash of each open pool that has some.
func eachFlash(f func(pool string, s *control.FlashStatus, send sender)) func(*control.Status, sender) {
	return func(st *control.Status, send sender) {
		for _, g := range st.Guests {
			for i := range g.PoolStats {
				if p := &g.PoolStats[i]; p.Flash != nil {
					f(p.Name, p.Flash, send)
				}
			}
		}
	}
}

// ofTiers sends what f says of each device whose data may be on flash, by operations and by
// the tier where the data was.
func ofTiers(f func(*control.FlashTier) (reads, writes float64)) func(*control.Status, sender) {
	return eachFlash(func(pool string, s *control.FlashStatus, send sender) {
		for i := range s.Primaries {
			p := &s.Primaries[i]
			for tier, t := range map[string]*control.FlashTier{"flash": &p.Flash, "device": &p.Primary} {
				reads, writes := f(t)
				send(reads, pool, p.Device, tier, "read")
				send(writes, pool, p.Device, tier, "write")
			}
		}
	})
}

// ofDevices sends what f says of each open device for which it says anything.
func ofDevices(f func(*control.DeviceStatus) (v float64, ok bool)) func(*control.Status, sender) {
	return func(st *control.Status, send sender) {
		for _, g := range st.Guests {
			for i := range g.Devices {
				d := &g.Devices[i]
				if v, ok := f(d); ok && d.Path != "" {
					send(v, d.Pool, d.Path)
				}
			}
		}
	}
}

// ofCopies is ofDevices for those that are copies of a mirror.
func ofCopies(f func(*control.DeviceStatus) float64) func(*control.Status, sender) {
	return ofDevices(func(d *control.DeviceStatus) (float64, bool) { return f(d), d.Mirror > 0 })
}

// ofExports sends what f says of each volume.
func ofExports(f func(*control.Export) float64) func(*control.Status, sender) {
	return func(st *control.Status, send sender) {
		for _, g := range st.Guests {
			for i := range g.Exports {
				e := &g.Exports[i]
				send(f(e), e.Volume, e.Guest)
			}
		}
	}
}

// ofSockets sends what f says of one socket of each volume that has that.
func ofSockets(socket func(*control.Export) *control.VolumeSocket, f func(*control.VolumeSocket, sender)) func(*control.Status, sender) {
	return func(st *control.Status, send sender) {
		for _, g := range st.Guests {
			for i := range g.Exports {
				e := &g.Exports[i]
				if v := socket(e); v != nil && v.Socket != "" {
					f(v, func(v float64, labels ...string) { send(v, append([]string{e.Volume, e.Guest}, labels...)...) })
				}
			}
		}
	}
}

// socketMetrics are those of one socket of each volume. clients describes the number of
// those that are attached there, who says what they are.
func socketMetrics(name, clients, who string, socket func(*control.Export) *control.VolumeSocket) []Metric {
	name = "pollux_volume_" + name
	of := func(f func(*control.VolumeSocket, sender)) func(*control.Status, sender) { return ofSockets(socket, f) }
	by := func(label string) []string { return append(byVolume[:2:2], label) }
	return []Metric{
		gauge(name+"_clients", clients, byVolume, of(func(v *control.VolumeSocket, send sender) { send(float64(v.Clients)) })),
		counter(name+"_requests_total", "Requests of "+who+" that have ended, by kind.", by("kind"), of(func(v *control.VolumeSocket, send sender) {
			send(float64(v.Reads), "read")
			send(float64(v.Writes), "write")
			send(float64(v.Flushes), "flush")
			send(float64(v.Discards), "discard")
			send(float64(v.WriteZeroes), "write_zeroes")
		})),
		counter(name+"_bytes_total", "Bytes that "+who+" have read and written.", by("direction"), of(func(v *control.VolumeSocket, send sender) {
			send(float64(v.ReadBytes), "read")
			send(float64(v.WrittenBytes), "write")
		})),
		counter(name+"_errors_total", "Requests of "+who+" that ended with an error.", byVolume, of(func(v *control.VolumeSocket, send sender) { send(float64(v.Errors)) })),
		counter(name+"_resubmitted_total", "Requests of "+who+" that were under way when their server ended, by what became of them: run again, or known to be in the log.", by("outcome"), of(func(v *control.VolumeSocket, send sender) {
			send(float64(v.Resubmitted), "run")
			send(float64(v.Skipped), "known")
		})),
	}
}

// ofSurveys sends what f says of each volume that was surveyed.
func ofSurveys(f func(*control.VolumeSurvey) float64) func(*control.Status, sender) {
	return func(st *control.Status, send sender) {
		for _, g := range st.Guests {
			for _, e := range g.Exports {
				if e.Survey != nil {
					send(f(e.Survey), e.Volume, e.Guest)
				}
			}
		}
	}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func seconds(d control.Duration) float64 { return time.Duration(d).Seconds() }

var (
	byGuest  = []string{"guest"}
	byPool   = []string{"pool"}
	byDevice = []string{"pool", "device"}
	byVolume = []string{"volume", "guest"}
	byTier   = []string{"pool", "device", "tier", "operation"}
)

// Metrics are all that a scrape gets beside those of the agent's process.
var Metrics = slices.Concat(own,
	socketMetrics("vhost_user", "Virtual machines that are attached to a volume.", "virtual machines", func(e *control.Export) *control.VolumeSocket {
		if e.VhostUser == nil {
			return nil
		}
		return &e.VhostUser.VolumeSocket
	}),
	socketMetrics("ring", "Rings in shared memory that programs have to a volume.", "programs with rings", func(e *control.Export) *control.VolumeSocket { return e.Ring }),
)

// own are those that there are once.
var own = []Metric{
	gauge("pollux_build_info", "Always 1; the version is a label.", []string{"version"}, func(st *control.Status, send sender) {
		send(1, st.Agent.Version)
	}),
	gauge("pollux_guest_build_info", "Always 1; version and build of the program that the guest runs are labels.", []string{"guest", "version", "build"}, func(st *control.Status, send sender) {
		for _, g := range st.Guests {
			if g.Build != "" {
				send(1, g.Name, g.Version, g.Build)
			}
		}
	}),
	gauge("pollux_upgrade_pending", "1 for the state of an upgrade that is under way or half done.", []string{"state"}, func(st *control.Status, send sender) {
		if st.Upgrade.Pending() {
			send(1, st.Upgrade.State)
		}
	}),
	gauge("pollux_protected", "Whether either guest may die now and nothing is lost.", nil, func(st *control.Status, send sender) {
		send(number(st.Protected))
	}),
	gauge("pollux_alerts", "Alerts that a person must look at.", nil, func(st *control.Status, send sender) {
		send(float64(len(st.AllAlerts())))
	}),
	gauge("pollux_last_takeover_seconds", "How long the newest takeover, giveback or restart in place took.", []string{"kind"}, func(st *control.Status, send sender) {
		if t := st.LastTakeover; t != nil {
			send(seconds(t.Total), t.Kind)
		}
	}),
	gauge("pollux_last_takeover_timestamp_seconds", "When the newest takeover, giveback or restart in place began.", []string{"kind"}, func(st *control.Status, send sender) {
		if t := st.LastTakeover; t != nil {
			send(float64(t.Started.UnixMilli())/1e3, t.Kind)
		}
	}),
	gauge("pollux_guest_state", "1 for the state that the guest is in.", []string{"guest", "state"}, func(st *control.Status, send sender) {
		for _, g := range st.Guests {
			send(1, g.Name, g.State)
		}
	}),
	gauge("pollux_guest_protected", "Whether its partner would serve its volumes at once.", byGuest, ofGuests(func(g *control.GuestStatus) float64 { return number(g.Protected) })),
	gauge("pollux_guest_served", "Whether anybody serves its volumes.", byGuest, ofGuests(func(g *control.GuestStatus) float64 { return number(g.ServedBy != "") })),
	counter("pollux_guest_restarts_total", "How often the agent has started it again.", byGuest, ofGuests(func(g *control.GuestStatus) float64 { return float64(g.Restarts) })),
	gauge("pollux_guest_policy", "1 for what comes first when it fails.", []string{"guest", "policy"}, func(st *control.Status, send sender) {
		for _, g := range st.Guests {
			send(1, g.Name, g.Policy)
		}
	}),
	counter("pollux_guest_restarts_in_place_total", "Restarts that came before a takeover and served in time.", byGuest, ofGuests(func(g *control.GuestStatus) float64 { return float64(g.Resumed) })),
	counter("pollux_guest_restarts_late_total", "Restarts that came first and did not serve in time.", byGuest, ofGuests(func(g *control.GuestStatus) float64 { return float64(g.ResumedLate) })),
	gauge("pollux_guest_spare", "Whether its next process is ready.", byGuest, ofGuests(func(g *control.GuestStatus) float64 { return number(g.Spare) })),
	gauge("pollux_guest_resident_bytes", "Memory of its process, shared memory included.", byGuest, ofGuests(func(g *control.GuestStatus) float64 { return float64(g.Memory.Resident) })),
	gauge("pollux_guest_cache_bytes", "Memory that is planned for the caches of both pools.", byGuest, ofGuests(func(g *control.GuestStatus) float64 { return float64(g.Memory.Cache) })),
	gauge("pollux_pool_capacity_bytes", "Space of the pool for data and metadata.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Capacity) })),
	gauge("pollux_pool_free_bytes", "Space of the pool that clients can still fill.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Free) })),
	gauge("pollux_pool_log_bytes", "Size of the operation log.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.LogBytes) })),
	gauge("pollux_pool_log_used_bytes", "Part of the operation log in use.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.LogUsed) })),
	gauge("pollux_pool_dirty_bytes", "What was acknowledged and is not on the devices.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Dirty) })),
	gauge("pollux_pool_cache_bytes", "Memory of the cache.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Cache.Bytes) })),
	gauge("pollux_pool_cache_own_bytes", "Memory of the cache that ends with its guest.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Cache.Own) })),
	gauge("pollux_pool_cache_used_bytes", "Blocks in the cache.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Cache.Used) })),
	counter("pollux_pool_cache_hits_total", "Blocks that were found in the cache since the pool was opened, pages of metadata too.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Cache.Hits) })),
	counter("pollux_pool_cache_misses_total", "Blocks that were not found in the cache since the pool was opened, pages of metadata too.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Cache.Misses) })),
	gauge("pollux_pool_failing", "Whether the newest consistency point failed.", byPool, ofPools(func(p *control.PoolStatus) float64 { return number(p.Error != "") })),
	counter("pollux_pool_consistency_points_total", "Number of the newest consistency point.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.CP) })),
	counter("pollux_pool_cleaned_tracks_total", "Tracks that the cleaner has made wholly free since the pool was opened.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Cleaner.Freed) })),
	gauge("pollux_pool_scrub_running", "Whether the pool is being scrubbed.", byPool, ofPools(func(p *control.PoolStatus) float64 { return number(p.Scrub.State == control.ScrubRunning) })),
	gauge("pollux_pool_scrub_unreadable_blocks", "Blocks that the newest scrub found on no copy.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Scrub.Unreadable()) })),
	counter("pollux_pool_page_repairs_total", "Pages of metadata that were written again from their twins since the pool was opened.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.PagesMended) })),
	counter("pollux_pool_dedup_shared_blocks_total", "Blocks of data that were stored already and are shared, since the pool was opened.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Dedup.Shared) })),
	counter("pollux_pool_dedup_written_blocks_total", "Blocks of data that were written, of volumes that share nothing too, since the pool was opened.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Dedup.Written) })),
	counter("pollux_pool_dedup_zero_blocks_total", "Blocks of zeroes that became holes since the pool was opened.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Dedup.Zeros) })),
	counter("pollux_pool_dedup_unequal_series_total", "Series of blocks that seemed to be stored already and were not, since the pool was opened.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Dedup.Unequal) })),
	gauge("pollux_pool_dedup_saved_bytes", "What the pool would need in addition if nothing were shared.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Dedup.Saved) })),
	gauge("pollux_pool_dedup_index_bytes", "Memory of the index of fingerprints, and of the one of another size that is being made.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Dedup.IndexBytes) })),
	gauge("pollux_pool_dedup_index_entries", "Entries of the index of fingerprints.", byPool, ofPools(func(p *control.PoolStatus) float64 { return float64(p.Dedup.IndexEntries) })),
	gauge("pollux_pool_mean_extent_blocks", "Mean length of the pieces in which volumes lie, as of the newest survey; 0 before the first.", byPool, ofPools(func(p *control.PoolStatus) float64 { return p.Dedup.MeanExtent })),
	gauge("pollux_pool_llrrm_bytes", "Low-latency memory of the pool.", byPool, ofLLRRM(func(m *control.LLRRMStatus) float64 { return float64(m.Bytes) })),
	gauge("pollux_pool_llrrm_used_bytes", "Low-latency memory in use.", byPool, ofLLRRM(func(m *control.LLRRMStatus) float64 { return float64(m.Used) })),
	gauge("pollux_pool_llrrm_waiting_blocks", "Blocks on disks whose references are still to follow to low-latency memory.", byPool, ofLLRRM(func(m *control.LLRRMStatus) float64 { return float64(m.Waiting) })),
	gauge("pollux_pool_llrrm_failed", "Whether low-latency memory could not be written since the pool was opened.", byPool, ofLLRRM(func(m *control.LLRRMStatus) float64 { return number(m.Failed) })),
	counter("pollux_pool_llrrm_written_blocks_total", "Blocks that went to low-latency memory since the pool was opened.", byPool, ofLLRRM(func(m *control.LLRRMStatus) float64 { return float64(m.Written) })),
	counter("pollux_pool_flash_requests_total", "Requests by where their data was, on flash (hits) or on the device, since the pool was opened.", byTier, ofTiers(func(t *control.FlashTier) (float64, float64) { return float64(t.Reads), float64(t.Writes) })),
	counter("pollux_pool_flash_request_bytes_total", "Bytes of requests by where their data was, since the pool was opened.", byTier, ofTiers(func(t *control.FlashTier) (float64, float64) { return float64(t.ReadBytes), float64(t.WriteBytes) })),
	gauge("pollux_pool_flash_latency_seconds", "Mean time of a sample of the requests by where their data was; 0 before any was timed.", byTier, ofTiers(func(t *control.FlashTier) (float64, float64) { return seconds(t.ReadLatency), seconds(t.WriteLatency) })),
	gauge("pollux_pool_flash_set_bytes", "Size of the data sets that move to flash.", byPool, ofFlash(func(f *control.FlashStatus) float64 { return float64(f.SetBytes) })),
	gauge("pollux_pool_flash_slots", "Data sets that find room on flash.", byPool, ofFlash(func(f *control.FlashStatus) float64 { return float64(f.Slots) })),
	gauge("pollux_pool_flash_used_slots", "Data sets on flash.", byPool, ofFlash(func(f *control.FlashStatus) float64 { return float64(f.Used) })),
	gauge("pollux_pool_flash_lost_sets", "Data sets on flash that cannot be reached.", byPool, ofFlash(func(f *control.FlashStatus) float64 { return float64(f.Lost) })),
	gauge("pollux_pool_flash_failed", "Whether flash cannot be written.", byPool, ofFlash(func(f *control.FlashStatus) float64 { return number(f.State == control.FlashFailed) })),
	counter("pollux_pool_flash_moved_sets_total", "Data sets that moved to flash (to_flash) or back (to_device), or were given up without a copy (given_up), since the pool was opened.", []string{"pool", "move"}, eachFlash(func(pool string, f *control.FlashStatus, send sender) {
		send(float64(f.Promoted), pool, "to_flash")
		send(float64(f.Demoted), pool, "to_device")
		send(float64(f.GivenUp), pool, "given_up")
	})),
	counter("pollux_pool_flash_failed_moves_total", "Moves of data sets that failed since the pool was opened.", byPool, ofFlash(func(f *control.FlashStatus) float64 { return float64(f.FailedMoves) })),
	gauge("pollux_pool_flash_queued_moves", "Moves that are decided and not done.", byPool, ofFlash(func(f *control.FlashStatus) float64 { return float64(f.Queued) })),
	counter("pollux_pool_flash_written_bytes_total", "Bytes written to flash by clients or by moves since the pool was opened.", []string{"pool", "by"}, eachFlash(func(pool string, f *control.FlashStatus, send sender) {
		send(float64(f.WrittenByClients), pool, "clients")
		send(float64(f.WrittenByMoves), pool, "moves")
	})),
	gauge("pollux_pool_flash_worn_bytes", "Bytes written to flash in 24 hours, as budget.wear counts them.", byPool, ofFlash(func(f *control.FlashStatus) float64 { return float64(f.Worn) })),
	gauge("pollux_pool_flash_evacuation_left_sets", "Data sets that an evacuation of flash has yet to move back.", byPool, ofFlash(func(f *control.FlashStatus) float64 { return float64(f.Left) })),
	gauge("pollux_pool_flash_pins_without_room", "Pins of which some part finds no room on flash.", byPool, ofFlash(func(f *control.FlashStatus) float64 { return float64(f.PinsWithoutRoom) })),
	counter("pollux_pool_flash_rule_errors_total", "Rules of the flash policy that could not be evaluated, since the pool was opened.", byPool, ofFlash(func(f *control.FlashStatus) float64 { return float64(f.RulesBroken) })),
	gauge("pollux_pool_absent_copies", "Copies of mirrors that are not there.", byPool, func(st *control.Status, send sender) {
		for _, g := range st.Guests {
			absent := map[string]float64{}
			for _, d := range g.Devices {
				if absent[d.Pool] += 0; d.State == "absent" {
					absent[d.Pool]++
				}
			}
			for pool, n := range absent {
				send(n, pool)
			}
		}
	}),
	gauge("pollux_device_size_bytes", "Size of an open device.", byDevice, ofDevices(func(d *control.DeviceStatus) (float64, bool) { return float64(d.Size), true })),
	counter("pollux_device_read_errors_total", "Reads of a device that failed since the pool was opened.", byDevice, ofDevices(func(d *control.DeviceStatus) (float64, bool) { return float64(d.ReadErrors), true })),
	counter("pollux_device_write_errors_total", "Writes, discards and syncs of a device that failed since the pool was opened.", byDevice, ofDevices(func(d *control.DeviceStatus) (float64, bool) { return float64(d.WriteErrors), true })),
	counter("pollux_device_corrupt_blocks_total", "Blocks read from a device of which this pool has no other copy, that were not what had been written.", byDevice, ofDevices(func(d *control.DeviceStatus) (float64, bool) { return float64(d.Corrupt), d.Mirror == 0 })),
	gauge("pollux_copy_in_sync", "Whether a copy of a mirror has everything.", byDevice, ofCopies(func(d *control.DeviceStatus) float64 { return number(d.State == "in sync") })),
	gauge("pollux_copy_resilver_bytes", "What is left to look at until a copy has everything.", byDevice, ofCopies(func(d *control.DeviceStatus) float64 { return float64(d.Resilver) })),
	counter("pollux_copy_repairs_total", "Ranges of a copy that were written again from another.", byDevice, ofCopies(func(d *control.DeviceStatus) float64 { return float64(d.Repaired) })),
	gauge("pollux_volume_size_bytes", "Size of a volume.", byVolume, ofExports(func(e *control.Export) float64 { return float64(e.Size) })),
	gauge("pollux_volume_would_free_bytes", "Data that deleting the volume would free, as of its newest survey.", byVolume, ofSurveys(func(s *control.VolumeSurvey) float64 { return float64(s.WouldFree) })),
	gauge("pollux_volume_mean_extent_blocks", "Mean length of the pieces in which the volume lies, as of its newest survey.", byVolume, ofSurveys(func(s *control.VolumeSurvey) float64 { return s.MeanExtent })),
	gauge("pollux_volume_survey_timestamp_seconds", "When the volume was surveyed.", byVolume, ofSurveys(func(s *control.VolumeSurvey) float64 { return float64(s.At.UnixMilli()) / 1e3 })),
	gauge("pollux_volume_connections", "Connections of clients to a volume, over NBD.", byVolume, ofExports(func(e *control.Export) float64 { return float64(e.Connections) })),
}

// collector asks for the status whenever it is scraped.
type collector struct {
	status Status
	log    *slog.Logger
}

var up = prometheus.NewDesc("pollux_up", "Whether the agent could tell how the pair is.", nil, nil)

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- up
	for _, m := range Metrics {
		ch <- m.desc
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	st, err := c.status(ctx)
	ch <- prometheus.MustNewConstMetric(up, prometheus.GaugeValue, number(err == nil))
	if err != nil {
		c.log.Warn("metrics", "error", err)
		return
	}
	for _, m := range Metrics {
		kind := prometheus.GaugeValue
		if m.counter {
			kind = prometheus.CounterValue
		}
		seen := map[string]bool{} // in the middle of a takeover both guests may tell of a pool
		m.collect(&st, func(v float64, labels ...string) {
			key := ""
			for _, l := range labels {
				key += l + "\x00"
			}
			if !seen[key] {
				seen[key] = true
				ch <- prometheus.MustNewConstMetric(m.desc, kind, v, labels...)
			}
		})
	}
}
