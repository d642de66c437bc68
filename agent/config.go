package agent

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/agent/envoy"
	"github.com/mantlet/mantlet/agent/hold"
	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// Config is what an agent is told. All fields are required except where they say otherwise.
type Config struct {
	Pod          string // "namespace/name"
	ControlPlane string // "host:port"
	TrustDomain  spiffeid.TrustDomain
	Bundle       *x509bundle.Bundle                 // roots that the control plane is verified against at first
	Reread       func() (*x509bundle.Bundle, error) // Bundle, as it is written now; nil: it never changes
	Token        func() (string, error)             // the pod's token; asked for each time it is needed
	Envoy        string                             // path of the binary, or its name on PATH
	RunDir       string                             // made if it is not there; the folders above must let the proxy's user pass
	Flows        io.Writer                          // flow records, one JSON object a line
	Concurrency  int                                // Envoy's worker threads; 0: 1
	Capture      Capture                            // who works in the kernel; "": CaptureSelf
	Exempt       envoy.Privilege                    // how the redirect tells Envoy's connections; "": envoy.OwnUser, with CaptureNode envoy.AgentUser
	DrainTimeout time.Duration                      // how long open connections may live on after the end was asked for; 0: they are cut
	RenewAfter   time.Duration                      // age at which the X.509-SVID is renewed, if that is before its half-life; 0: at half-life
	SessionBound time.Duration                      // how long TLS sessions may be resumed, and an expired certificate with them; 0: sds.SessionBound
	EnvoyLog     io.Writer                          // Envoy's log; nil: thrown away
	Logger       *slog.Logger

	user     proxyuser.User     // as whom Envoy runs
	tuneHold func(*hold.Config) // for tests that cannot wait for what is slow on purpose; nil: hold.Defaults
}

// Capture says who does in the kernel what takes privileges.
type Capture string

const (
	// CaptureSelf is the agent.
	CaptureSelf Capture = "redirect"
	// CaptureNode is the daemon of the pod's node: the agent has no privileges.
	CaptureNode Capture = "node"
)

// AgentSocket is the path of the socket for Envoy in a run directory.
func AgentSocket(runDir string) string { //nolint:revive // which of the sockets, not which package
	return filepath.Join(runDir, "agent.sock")
}

// StatusSocket is the path of the socket for probes in a run directory.
func StatusSocket(runDir string) string { return filepath.Join(runDir, "status.sock") }

// NodeSocket is the path of the socket for the node's daemon in a run directory.
func NodeSocket(runDir string) string { return filepath.Join(runDir, "node.sock") }

// EnvoyDir is Envoy's own folder in a run directory.
func EnvoyDir(runDir string) string { return filepath.Join(runDir, "envoy") }

func (c *Config) check() error {
	if c.Concurrency == 0 {
		c.Concurrency = 1
	}
	if c.Capture == "" {
		c.Capture = CaptureSelf
	}
	switch {
	case c.Exempt == "" && c.Capture == CaptureNode:
		c.Exempt = envoy.AgentUser
	case c.Exempt == "":
		c.Exempt = envoy.OwnUser
	}
	if c.EnvoyLog == nil {
		c.EnvoyLog = io.Discard
	}
	if _, _, err := net.SplitHostPort(c.ControlPlane); err != nil {
		return fmt.Errorf("control plane address %q: %w", c.ControlPlane, err)
	}
	switch {
	case c.Capture != CaptureSelf && c.Capture != CaptureNode:
		return fmt.Errorf("capture %q: not %s or %s", string(c.Capture), CaptureSelf, CaptureNode)
	case (c.Capture == CaptureNode) != (c.Exempt == envoy.AgentUser):
		return fmt.Errorf("capture %s does not go with exempt %s: with capture %s, and only then, the agent's own user is exempt", c.Capture, c.Exempt, CaptureNode)
	case c.TrustDomain.IsZero():
		return errors.New("the trust domain is missing")
	case c.Bundle == nil || c.Bundle.Empty():
		return errors.New("the trust bundle is missing or holds no certificate")
	case c.Token == nil || c.Flows == nil || c.Logger == nil:
		return errors.New("token, flows and logger must be set")
	case c.RunDir == "":
		return errors.New("the run directory is missing")
	case c.DrainTimeout < 0:
		return fmt.Errorf("drain timeout %s is negative", c.DrainTimeout)
	case c.RenewAfter < 0:
		return fmt.Errorf("renewal after %s: negative", c.RenewAfter)
	case c.SessionBound < 0 || c.SessionBound > 0 && c.SessionBound < time.Second:
		return fmt.Errorf("session bound %s: at least 1s; to resume no sessions at all is for the control plane to say", c.SessionBound)
	}
	var err error
	c.RunDir, err = filepath.Abs(c.RunDir)
	return err
}

// redirect is the netfilter configuration that goes with how Envoy runs.
func (c *Config) redirect() (netfilter.Config, error) {
	switch c.Exempt {
	case envoy.OwnUser:
		return netfilter.ByUser(c.user), nil
	case envoy.SharedUser:
		return netfilter.ByMark(), nil
	}
	return netfilter.Config{}, fmt.Errorf("exempt %q: not %s or %s", string(c.Exempt), envoy.OwnUser, envoy.SharedUser)
}

// hold is the SYN hold's configuration, but for what the control plane says.
func (c *Config) hold() hold.Config {
	h := hold.Defaults()
	if c.Exempt == envoy.OwnUser { // else Envoy's sockets carry the mark
		h.Users = []proxyuser.User{c.user}
	}
	if c.tuneHold != nil {
		c.tuneHold(&h)
	}
	return h
}
