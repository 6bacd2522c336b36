package config

import (
	"fmt"
	"time"
)

// What comes first when a guest fails.
const (
	// RestartFirst starts the guest again at once. Its partner takes over what it
	// does not serve within the limit, and when it has failed before within
	// CrashWindow.
	RestartFirst = "restart-first"
	// TakeoverFirst lets the partner take over at once.
	TakeoverFirst = "takeover-first"

	// DefaultPolicy is the policy of pairs that name none.
	DefaultPolicy = TakeoverFirst
)

// Failover are the rules of takeover and giveback.
type Failover struct {
	// Policy says what comes first when a guest fails: its own restart, or the
	// takeover by its partner; [RestartFirst] or [TakeoverFirst].
	Policy string `yaml:"policy" json:"policy"`
	// RestartLimit is how long a guest that is started again first may take until it
	// serves. Then its partner takes over.
	RestartLimit time.Duration `yaml:"restart_limit" json:"restart_limit"`
	// HangTimeout is how long a heartbeat may stand still.
	HangTimeout time.Duration `yaml:"hang_timeout" json:"hang_timeout"`
	// Heartbeat is how often a guest probes itself and beats.
	Heartbeat time.Duration `yaml:"heartbeat" json:"heartbeat"`
	// GivebackDelay is how long a guest that came back must be well before
	// it is given its identity. Negative: only by command.
	GivebackDelay time.Duration `yaml:"giveback_delay" json:"giveback_delay"`
	// LockoutCount automatic givebacks within LockoutWindow are the last;
	// after them a person must give back.
	LockoutCount  int           `yaml:"lockout_count" json:"lockout_count"`
	LockoutWindow time.Duration `yaml:"lockout_window" json:"lockout_window"`
	// RestartDelay is the wait before a failed guest is started again; it
	// doubles with each failure up to RestartMax.
	RestartDelay time.Duration `yaml:"restart_delay" json:"restart_delay"`
	RestartMax   time.Duration `yaml:"restart_max" json:"restart_max"`
	// CrashLimit failures within CrashWindow stop the restarts.
	CrashLimit  int           `yaml:"crash_limit" json:"crash_limit"`
	CrashWindow time.Duration `yaml:"crash_window" json:"crash_window"`
	// StuckTimeout is how long what brings a pool's data to its devices may do nothing,
	// with no device to wait for, before the guest ends itself.
	StuckTimeout time.Duration `yaml:"stuck_timeout" json:"stuck_timeout"`
	// FenceTimeout bounds the wait for a killed guest's device locks.
	FenceTimeout time.Duration `yaml:"fence_timeout" json:"fence_timeout"`
}

func (f *Failover) setDefaults() {
	or(&f.Policy, DefaultPolicy)
	or(&f.RestartLimit, 500*time.Millisecond)
	or(&f.HangTimeout, time.Second)
	or(&f.Heartbeat, 50*time.Millisecond)
	or(&f.GivebackDelay, 15*time.Second)
	or(&f.LockoutCount, 2)
	or(&f.LockoutWindow, 10*time.Minute)
	or(&f.RestartDelay, 500*time.Millisecond)
	or(&f.RestartMax, 30*time.Second)
	or(&f.CrashLimit, 8)
	or(&f.CrashWindow, 5*time.Minute)
	or(&f.StuckTimeout, time.Minute)
	or(&f.FenceTimeout, 5*time.Second)
}

func (f *Failover) validate() error {
	if err := validatePolicy("failover.policy", f.Policy); err != nil {
		return err
	}
	switch {
	case f.RestartLimit < 50*time.Millisecond:
		return fmt.Errorf("failover.restart_limit: %s is too short, at least 50ms", f.RestartLimit)
	case f.Heartbeat < 5*time.Millisecond:
		return fmt.Errorf("failover.heartbeat: %s is too short, at least 5ms", f.Heartbeat)
	case f.HangTimeout < 4*f.Heartbeat:
		return fmt.Errorf("failover.hang_timeout: %s must be at least four heartbeats of %s", f.HangTimeout, f.Heartbeat)
	case f.LockoutCount < 1:
		return fmt.Errorf("failover.lockout_count: %d, at least 1", f.LockoutCount)
	case f.RestartDelay < 0 || f.RestartMax < f.RestartDelay:
		return fmt.Errorf("failover.restart_delay: %s must lie between 0 and restart_max %s", f.RestartDelay, f.RestartMax)
	case f.CrashLimit < 1:
		return fmt.Errorf("failover.crash_limit: %d, at least 1", f.CrashLimit)
	case f.StuckTimeout < 5*time.Second:
		return fmt.Errorf("failover.stuck_timeout: %s is too short, at least 5s", f.StuckTimeout)
	case f.FenceTimeout < 100*time.Millisecond:
		return fmt.Errorf("failover.fence_timeout: %s is too short, at least 100ms", f.FenceTimeout)
	}
	return nil
}

func validatePolicy(setting, policy string) error {
	if policy != RestartFirst && policy != TakeoverFirst {
		return fmt.Errorf("%s: %q is neither %s nor %s", setting, policy, RestartFirst, TakeoverFirst)
	}
	return nil
}
