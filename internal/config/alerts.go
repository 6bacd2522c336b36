package config

import (
	"fmt"
	"net"
	"time"
)

// Alerts says who is told of alerts beside those who ask for the status.
type Alerts struct {
	// Command is a program and its arguments, which the agent runs for each alert
	// that is raised or over. Empty: none.
	Command []string `yaml:"command" json:"command,omitempty"`
	// FullWarning and FullCritical are how full a pool may be, in percent, before
	// that is an alert.
	FullWarning  int `yaml:"full_warning" json:"full_warning"`
	FullCritical int `yaml:"full_critical" json:"full_critical"`
	// SlowDevice is how long half of the reads of a block of a device may take
	// before that is an alert.
	SlowDevice time.Duration `yaml:"slow_device" json:"slow_device"`
	// StuckDevice is how long a request to a device may take before that is an alert.
	StuckDevice time.Duration `yaml:"stuck_device" json:"stuck_device"`
}

func (a *Alerts) setDefaults() {
	or(&a.FullWarning, 80)
	or(&a.FullCritical, 95)
	or(&a.SlowDevice, 200*time.Millisecond)
	or(&a.StuckDevice, 5*time.Second)
}

func (a *Alerts) validate() error {
	if a.FullWarning < 1 || a.FullCritical > 100 || a.FullWarning > a.FullCritical {
		return fmt.Errorf("alerts: full_warning %d and full_critical %d must be percentages, the first not above the second", a.FullWarning, a.FullCritical)
	}
	if a.SlowDevice < time.Millisecond {
		return fmt.Errorf("alerts: slow_device %v is less than 1ms", a.SlowDevice)
	}
	if a.StuckDevice < time.Second {
		return fmt.Errorf("alerts: stuck_device %v is less than 1s", a.StuckDevice)
	}
	return nil
}

// Metrics are the settings of the monitoring endpoint.
type Metrics struct {
	// Address is where the agent serves /metrics and /healthz over HTTP, as
	// host:port. Empty: nowhere.
	Address string `yaml:"address" json:"address,omitempty"`
}

func (m *Metrics) validate() error {
	if m.Address == "" {
		return nil
	}
	if _, _, err := net.SplitHostPort(m.Address); err != nil {
		return fmt.Errorf("metrics.address: %w; write it like 127.0.0.1:9427", err)
	}
	return nil
}
