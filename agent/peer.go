package agent

import (
	"fmt"
	"log/slog"
	"net"
	"sync"

	"github.com/mantlet/mantlet/agent/link"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// peer is the one process that may use the agent's socket.
type peer struct {
	user proxyuser.User

	mu      sync.Mutex
	pid     int // 0: none runs
	changed chan struct{}
}

func newPeer(user proxyuser.User) *peer { return &peer{user: user, changed: make(chan struct{})} }

// set names the process; 0 is for when it has gone.
func (p *peer) set(pid int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pid = pid
	close(p.changed)
	p.changed = make(chan struct{})
}

// get returns the process and a channel that is closed when it is another.
func (p *peer) get() (pid int, changed <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pid, p.changed
}

// admit fails unless the process at the other end of a unix socket connected as this one.
func (p *peer) admit(conn net.Conn) error {
	cred, err := link.Credentials(conn.(*net.UnixConn))
	if err != nil {
		return err
	}
	pid, _ := p.get()
	if pid == 0 || int(cred.Pid) != pid || cred.Uid != p.user.UID {
		return fmt.Errorf("process %d of user %d is not this agent's envoy (process %d of user %d)", cred.Pid, cred.Uid, pid, p.user.UID)
	}
	return nil
}

// guarded is a unix listener that admits one process only.
type guarded struct {
	net.Listener
	peer   *peer
	logger *slog.Logger
}

// Accept implements net.Listener.
func (g guarded) Accept() (net.Conn, error) {
	for {
		conn, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if err := g.peer.admit(conn); err != nil {
			g.logger.Warn("agent socket: refused", "error", err)
			conn.Close()
			continue
		}
		return conn, nil
	}
}
