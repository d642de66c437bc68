package revoke

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/mantlet/mantlet/xds/names"
)

const (
	// auditEvery is how often the table is held against the kernel. A dump walks the machine's whole table of connections.
	auditEvery = 20 * time.Second
	// grace is how long a socket of Envoy's may go without being told of: longer than a connect with its TLS handshake may take.
	grace = 15 * time.Second
)

// Owner tells whether a socket is Envoy's.
type Owner func(*socket) bool

// ByUser goes by the user, of which nothing else in the pod runs.
func ByUser(uid uint32) Owner { return func(k *socket) bool { return k.uid == uid } }

// ByMark goes by the mark on Envoy's sockets. The agent's own have it too and are left out elsewhere; apps cannot set it.
func ByMark(mark uint32) Owner { return func(k *socket) bool { return k.mark == mark } }

// audit forgets connections that the kernel no longer has, tries again to cut what could not be cut, and closes sockets that nobody told of.
func (r *Revoker) audit() {
	began := time.Now()
	all, err := r.kernel.list()
	if err == nil {
		err = r.reconcile(all, began)
	}
	if err != nil {
		r.cfg.Logger.Error("revoke: audit", "error", err)
	}
	r.sweep()
}

// reconcile is what an audit makes of the sockets that were there after it began.
func (r *Revoker) reconcile(all []socket, began time.Time) error {
	own, err := ownInodes()
	if err != nil {
		return err
	}
	there := make(map[ends]bool, len(all))
	var odd []socket
	r.mu.Lock()
	for i := range all {
		k := &all[i]
		there[k.ends] = true
		onward := k.ends.local.Port() != names.InboundPort && k.ends.local.Port() != names.OutboundPort
		if onward && k.inode != 0 && !own[k.inode] && r.cfg.Envoy(k) && r.open[k.ends] == nil {
			odd = append(odd, *k)
		}
	}
	for key, n := range r.open {
		switch {
		case !there[key] && n.told.Before(began):
			delete(r.open, key)
		case n.cut: // it was to be gone: the sweep tries again
			n.cut = false
		}
	}
	r.mu.Unlock()

	seen := make(map[[8]byte]time.Time, len(odd))
	var doomed []socket
	for _, k := range odd {
		first, ok := r.strangers[k.cookie]
		if !ok {
			first = began
		}
		seen[k.cookie] = first
		if began.Sub(first) >= grace {
			doomed = append(doomed, k)
		}
	}
	r.strangers = seen
	for i, err := range r.kernel.destroy(doomed) {
		r.cfg.Logger.Error("revoke: closed a connection of envoy's that its log does not tell of: nobody can judge it",
			"local", doomed[i].ends.local, "remote", doomed[i].ends.remote, "error", err)
	}
	return nil
}

// ownInodes are the sockets of this process.
func ownInodes() (map[uint32]bool, error) {
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, fmt.Errorf("tell the agent's own sockets: %w", err)
	}
	own := map[uint32]bool{}
	for _, f := range files {
		target, err := os.Readlink("/proc/self/fd/" + f.Name())
		if err != nil || !strings.HasPrefix(target, "socket:[") {
			continue // closed since
		}
		var inode uint32
		if _, err := fmt.Sscanf(target, "socket:[%d]", &inode); err == nil {
			own[inode] = true
		}
	}
	return own, nil
}
