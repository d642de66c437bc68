package agent

import (
	"github.com/mantlet/mantlet/agent/envoy"
	"github.com/mantlet/mantlet/agent/flows"
	"github.com/mantlet/mantlet/agent/revoke"
	"github.com/mantlet/mantlet/xds/names"
)

// watchConnections has open connections held against the pod's verdicts.
func (a *agent) watchConnections() (err error) {
	owner := revoke.ByUser(a.cfg.user.UID)
	if a.cfg.Exempt == envoy.SharedUser {
		owner = revoke.ByMark(names.ProxyMark)
	}
	var destroy func([]revoke.Socket) []error
	if r, ok := a.kernel.(*remote); ok {
		destroy = r.destroy
		r.attached = func() { a.revoker.Again() }
	}
	a.revoker, err = revoke.New(revoke.Config{
		Verdicts: a.verdicts, Envoy: owner, Logger: a.cfg.Logger, Destroy: destroy,
		Coming: func() bool { return a.relay.Coming(names.TypeVerdicts) },
		Record: func(r flows.Record) {
			r.Self = a.self()
			a.flows.Add(r)
		},
	})
	if err == nil {
		a.flows.Observe(a.revoker)
	}
	return err
}
