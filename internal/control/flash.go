package control

import (
	"context"
	"net/http"
	"net/url"
	"time"
)

// The states of the flash of a pool.
const (
	FlashInUse      = "in use"
	FlashEvacuating = "evacuating"
	FlashEvacuated  = "evacuated"
	FlashFailed     = "failed"
)

// FlashStatus are the figures of the flash of a pool. Its counts are those since the pool
// was opened, sizes are bytes.
type FlashStatus struct {
	Device string `json:"device"` // or the mirror
	State  string `json:"state"`
	Why    string `json:"why,omitempty"` // what it waits for, or cannot do
	// SetBytes is the size of a data set. Slots of them find room, Used are on flash, and
	// Lost of those cannot be reached.
	SetBytes int64 `json:"set_bytes"`
	Slots    int   `json:"slots"`
	Used     int   `json:"used_slots"`
	Lost     int   `json:"lost_sets,omitempty"`
	// Left of Total data sets are still to be moved back by an evacuation.
	Left  int `json:"evacuation_left_sets,omitempty"`
	Total int `json:"evacuation_total_sets,omitempty"`
	// HitShare is the share of the requests that flash has served, 0 to 1.
	HitShare  float64        `json:"hit_share"`
	Primaries []FlashPrimary `json:"devices"`
	Promoted  uint64         `json:"promoted_sets"`
	Demoted   uint64         `json:"demoted_sets"`
	// GivenUp sets left flash without a copy, because nobody needed their data any more.
	GivenUp     uint64 `json:"given_up_sets"`
	FailedMoves uint64 `json:"failed_moves"`
	Queued      int    `json:"queued_moves"`
	// Stopped is the limit for which more moves wait, such as "budget.migrate".
	Stopped string `json:"moves_wait_for,omitempty"`
	// Worn was written to flash in 24 hours.
	Worn             int64  `json:"worn_bytes"`
	WrittenByClients uint64 `json:"written_by_clients_bytes"`
	WrittenByMoves   uint64 `json:"written_by_moves_bytes"`
	// Rules were evaluated and could not be, the newest time for the reason of RuleError.
	RulesEvaluated uint64 `json:"rules_evaluated"`
	RulesBroken    uint64 `json:"rules_broken"`
	RuleError      string `json:"rule_error,omitempty"`
	// PinsWithoutRoom are those of which some part is not on flash and finds no room.
	PinsWithoutRoom int `json:"pins_without_room,omitempty"`
}

// FlashPrimary is a device of a pool whose data sets may be on flash.
type FlashPrimary struct {
	Device string `json:"device"` // or the mirror
	Number int    `json:"number"` // in the pool, from 0
	// Class selects the pattern parameters; Given says that somebody has chosen it.
	Class     string         `json:"class"`
	Given     bool           `json:"class_given,omitempty"`
	OnFlash   int            `json:"sets_on_flash"`
	Flash     FlashTier      `json:"flash"`   // requests that went to flash
	Primary   FlashTier      `json:"primary"` // and those that went to the device
	Collected FlashCollected `json:"collected"`
}

// FlashTier counts the requests that went to one tier.
type FlashTier struct {
	Reads      uint64 `json:"reads"`
	Writes     uint64 `json:"writes"`
	ReadBytes  uint64 `json:"read_bytes"`
	WriteBytes uint64 `json:"write_bytes"`
	// The latencies are means of a sample, 0 when none was timed.
	ReadLatency  Duration `json:"read_latency_ms,omitempty"`
	WriteLatency Duration `json:"write_latency_ms,omitempty"`
}

// FlashCollected tells of what is known of the use of a device.
type FlashCollected struct {
	Sets    int    `json:"sets"`         // of which something is known
	Most    int    `json:"most_sets"`    // of which it can be
	Evicted uint64 `json:"evicted_sets"` // that had to make room
	Bytes   int64  `json:"bytes"`        // of memory
	Counted uint64 `json:"counted"`      // accesses
	Lost    uint64 `json:"lost"`         // accesses that were not counted
}

// PoolFlash tells all of the flash of a pool.
type PoolFlash struct {
	Pool  string `json:"pool"`
	Guest string `json:"guest"` // its identity
	FlashStatus
	// MigrateBudget limits what is copied in a second, WearBudget what promotions and
	// clients write to flash in 24 hours before promotions wait; 0 limits nothing.
	MigrateBudget int64 `json:"migrate_budget_bytes"`
	WearBudget    int64 `json:"wear_budget_bytes"`
	// Failures are sets whose moves failed, the first of them.
	Failures []FlashFailure `json:"failures"`
	Pins     []FlashPinned  `json:"pins"`
	// Top are the data sets that save most time on flash, or would.
	Top []FlashSet `json:"top"`
	// Kept is when what was collected was written to the flash device last.
	Kept time.Time `json:"kept,omitzero"`
}

// FlashFailure is a data set whose moves fail.
type FlashFailure struct {
	Device string    `json:"device"`
	Offset int64     `json:"offset"`
	Times  int       `json:"times"`
	Until  time.Time `json:"next_try"`
	Reason string    `json:"reason"`
}

// FlashPin is a range of a volume that shall be on flash.
type FlashPin struct {
	Volume string `json:"volume"` // empty for one that was deleted since
	Offset int64  `json:"offset"`
	Length int64  `json:"length"` // 0 is to the end of the volume
}

// The states of pins.
const (
	PinWhole   = "whole"
	PinPartly  = "partly"
	PinWaiting = "waiting"
	PinNoRoom  = "no room"
)

// FlashPinned is a pin and what has become of it.
type FlashPinned struct {
	FlashPin
	Sets int `json:"sets"`      // data sets that hold something of the range
	On   int `json:"on_flash"`  // of them on flash
	Room int `json:"will_come"` // of the others find room
	// State is one of the states of pins, "nothing there", or "no volume".
	State string `json:"state"`
}

// Short reports whether some part of a pin is not on flash and finds no room.
func (p FlashPinned) Short() bool { return p.On+p.Room < p.Sets }

// FlashSet is a data set and its use. Reads and Writes are means of a window.
type FlashSet struct {
	Device       string   `json:"device"`
	Offset       int64    `json:"offset"`
	OnFlash      bool     `json:"on_flash"`
	Pinned       bool     `json:"pinned,omitempty"`
	Reads        float64  `json:"reads"`
	Writes       float64  `json:"writes"`
	Sequential   float64  `json:"sequential"` // accesses in runs
	RequestBytes float64  `json:"request_bytes"`
	Age          Duration `json:"age_ms"`
	Benefit      Duration `json:"saves_ms"` // in a window
}

// Flash tells of the flash of a pool.
func (c *Client) Flash(ctx context.Context, pool string) (p PoolFlash, err error) {
	err = c.agent.call(ctx, http.MethodGet, "/v1/pools/"+url.PathEscape(pool)+"/flash", nil, &p)
	return p, err
}

// FlashParameter is one parameter of the policy.
type FlashParameter struct {
	Name    string `json:"name"`
	Value   string `json:"value"`
	Default string `json:"default"`
}

// FlashChange is what has changed of a policy.
type FlashChange struct {
	Name string `json:"parameter"`
	Was  string `json:"was"`
	Now  string `json:"now"`
}

// FlashPolicy are the parameters by which data moves to flash.
type FlashPolicy struct {
	Pool       string           `json:"pool"`
	Guest      string           `json:"guest"`
	Parameters []FlashParameter `json:"parameters"`
	// Classes are those of the devices.
	Classes []FlashClass `json:"classes"`
	// Changes are in the answer to a change: what it has changed.
	Changes []FlashChange `json:"changes,omitempty"`
}

// FlashClass is the class of a device.
type FlashClass struct {
	Device string `json:"device"`
	Class  string `json:"class"`
	Given  bool   `json:"class_given,omitempty"`
}

// FlashPolicyChange changes a policy, all of it or nothing. What it resets is reset first.
type FlashPolicyChange struct {
	// Class is the class of devices whose pattern is changed: then names are those of
	// parameters of a pattern. Without one such names are of the default pattern.
	Class string `json:"device_class,omitempty"`
	// Set are values by the names of parameters.
	Set map[string]string `json:"set,omitempty"`
	// Reset are names of parameters, or groups of them, that get their defaults.
	Reset []string `json:"reset,omitempty"`
	// ResetAll gives all parameters their defaults; with a Class, those of its pattern.
	ResetAll bool `json:"reset_all,omitempty"`
	// Classes gives devices classes; an empty one takes back what was given.
	Classes map[string]string `json:"classes,omitempty"`
}

// FlashPolicy returns the parameters of a pool's flash.
func (c *Client) FlashPolicy(ctx context.Context, pool string) (p FlashPolicy, err error) {
	err = c.agent.call(ctx, http.MethodGet, "/v1/pools/"+url.PathEscape(pool)+"/flash/policy", nil, &p)
	return p, err
}

// ChangeFlashPolicy changes parameters of a pool's flash.
func (c *Client) ChangeFlashPolicy(ctx context.Context, pool string, ch FlashPolicyChange) (p FlashPolicy, err error) {
	err = c.agent.call(ctx, http.MethodPatch, "/v1/pools/"+url.PathEscape(pool)+"/flash/policy", ch, &p)
	return p, err
}

// What may be asked of a pin.
const (
	PinAdd    = "add"
	PinRemove = "remove"
)

// FlashPinChange adds a pin, or removes one. A removal without a range is that of all pins
// of the volume.
type FlashPinChange struct {
	Action string `json:"action"`
	Offset int64  `json:"offset,omitempty"`
	Length int64  `json:"length,omitempty"` // 0 is to the end of the volume
	All    bool   `json:"all,omitempty"`    // only of a removal
}

// ChangeFlashPin changes the pins of a volume.
func (c *Client) ChangeFlashPin(ctx context.Context, volume string, ch FlashPinChange) (p PoolFlash, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/volumes/"+url.PathEscape(volume)+"/flash/pins", ch, &p)
	return p, err
}

// What may be asked of the evacuation of flash.
const (
	EvacuateStart = "start"
	EvacuateStop  = "stop"
)

// FlashEvacuation asks for an evacuation, or for its end.
type FlashEvacuation struct {
	Action string `json:"action"`
}

// EvacuateFlash begins to move all data back from flash, or lets flash be used again.
func (c *Client) EvacuateFlash(ctx context.Context, pool string, e FlashEvacuation) (p PoolFlash, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(pool)+"/flash/evacuation", e, &p)
	return p, err
}

// FlashPlace asks why a block of a volume is where it is.
type FlashPlace struct {
	Offset int64 `json:"offset"` // bytes
}

// The places of a block.
const (
	PlaceHole   = "hole"
	PlaceLog    = "log" // no consistency point has written it yet
	PlaceDevice = "device"
)

// FlashExplanation says why a block of a volume is where it is.
type FlashExplanation struct {
	Pool    string `json:"pool"`
	Volume  string `json:"volume"`
	Offset  int64  `json:"offset"`
	Where   string `json:"where"`
	Device  string `json:"device,omitempty"`
	At      int64  `json:"device_offset"`
	OnFlash bool   `json:"on_flash"`
	// Movable is why its data set never moves, empty where it may. Then the rest is known.
	Movable string `json:"never_moves,omitempty"`
	Class   string `json:"class,omitempty"`
	Pattern string `json:"pattern,omitempty"` // the class whose pattern counts
	State   string `json:"state,omitempty"`
	Pinned  bool   `json:"pinned,omitempty"`
	// Limits are what the set shows beside what it should.
	Limits []FlashLimit `json:"limits"`
	// Rule is that of promotion, of a set on flash that of demotion.
	Rule      string `json:"rule,omitempty"`
	Holds     bool   `json:"rule_holds,omitempty"`
	RuleError string `json:"rule_error,omitempty"`
	// Benefit is the time that flash saves in a window, Rank its place by it among Of
	// sets, 0 where it has none; Slots of them find room.
	Benefit Duration `json:"saves_ms"`
	Rank    int      `json:"rank"`
	Of      int      `json:"of"`
	Slots   int      `json:"slots"`
	// Missing is what keeps it from flash, or would let it leave.
	Missing []string  `json:"missing,omitempty"`
	Retry   time.Time `json:"next_try,omitzero"`
	Failure string    `json:"failure,omitempty"`
	Summary string    `json:"summary"`
}

// FlashLimit is what a data set shows, and what it should.
type FlashLimit struct {
	Name  string `json:"parameter"`
	Value string `json:"value"`
	Limit string `json:"limit"`
	Holds bool   `json:"holds"`
}

// ExplainFlash says why a block of a volume is where it is.
func (c *Client) ExplainFlash(ctx context.Context, volume string, at FlashPlace) (x FlashExplanation, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/volumes/"+url.PathEscape(volume)+"/flash/explanation", at, &x)
	return x, err
}

// FlashTrial asks what another policy, or more or less flash, would come to.
type FlashTrial struct {
	FlashPolicyChange
	// Bytes is how much data finds room on flash; 0 is as much as does.
	Bytes int64 `json:"slots_bytes,omitempty"`
}

// FlashPrediction is what a policy would have come to over the history that was collected.
type FlashPrediction struct {
	Pool     string        `json:"pool"`
	Windows  int           `json:"windows"` // of the history; 0 predicts nothing
	From     time.Time     `json:"from,omitzero"`
	To       time.Time     `json:"to,omitzero"`
	SetBytes int64         `json:"set_bytes"`
	Now      FlashForecast `json:"now"`
	Then     FlashForecast `json:"then"`
	// Changes are those of the parameters.
	Changes []FlashChange `json:"changes"`
}

// FlashForecast is the share of accesses outside of runs that flash serves, the mean time of
// all accesses, and the moves that it takes.
type FlashForecast struct {
	Slots    int      `json:"slots"`
	HitShare float64  `json:"hit_share"`
	Mean     Duration `json:"mean_latency_ms"`
	Promoted int      `json:"promoted_sets"`
	Demoted  int      `json:"demoted_sets"`
}

// SimulateFlash predicts what another policy would come to. It changes nothing.
func (c *Client) SimulateFlash(ctx context.Context, pool string, t FlashTrial) (p FlashPrediction, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(pool)+"/flash/simulation", t, &p)
	return p, err
}
